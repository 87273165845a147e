# cython: language_level=3, boundscheck=False, wraparound=False, cdivision=True, freethreading_compatible=True
# distutils: language = c++
"""The Python interface of the CPU kernels: takes arrays by the buffer protocol and passes a kl::Plan to kl_batch.h.

Called by klcore.backends.cpu, which has checked and broadcast everything. bfloat16 arrives as opaque two-byte items,
NumPy's V2. The GIL is released while rows are computed; the main thread takes it now and then to check for signals.
"""
from cpython.buffer cimport PyBUF_FORMAT, PyBUF_STRIDES, PyBUF_WRITABLE, PyBuffer_Release, PyObject_GetBuffer
from libc.string cimport memset
from libcpp.atomic cimport atomic

import os
import threading

import numpy

cdef extern from "kl_batch.h" namespace "kl" nogil:
    ctypedef long long i64 "kl::i64"
    int MAX_DIMS
    int PER_ROW, TERMS, TOTAL
    int FLOAT64, FLOAT32, FLOAT16, BFLOAT16
    int INT8, UINT8
    int PROBS, LOG_PROBS, LOGITS, COUNTS
    int _CHUNK "kl::CHUNK"
    int _COLUMNS "kl::COLUMNS"
    double _COLDEST "kl::COLDEST"
    double _HOTTEST "kl::HOTTEST"
    double _COLDEST_NARROW "kl::COLDEST_NARROW"
    double _HOTTEST_NARROW "kl::HOTTEST_NARROW"
    int size_of(int)
    int _BY_TERM "kl::BY_TERM"
    int _BY_RATIO "kl::BY_RATIO"
    int _BY_COST "kl::BY_COST"
    int _BY_CLASS "kl::BY_CLASS"
    int _ALPHA_DIV "kl::ALPHA_DIV"
    int _RENYI_DIV "kl::RENYI_DIV"
    int OPERATION_COUNT
    cdef struct OperationRow:
        const char* name
        int form, arguments
    const OperationRow* operation_rows "kl::OPERATIONS"
    cdef struct Array:
        char* data
        i64 stride
        i64* batch
        int dtype
    ctypedef unsigned long long Key "kl::Key"
    int _BUCKET "kl::BUCKET"
    int _ZERO "kl::ZERO"
    int _RENORM "kl::RENORM"
    int _ROW_NUMBERS "kl::ROW_NUMBERS"
    int _NORM_STATES "kl::NORM_STATES"
    unsigned _OUTSIDE "kl::OUTSIDE"
    Key _PLACE_OF_KEY "kl::PLACE_OF_KEY"
    int SUM_OTHERS, SPREAD, COPY
    cdef struct Sparse:
        i64 count
        int tail, space_x, space_y
        Array x, indices, tail_mass
        Key* keys
        double* known
        double* xs
        double* ys
        double* slopes
        double* dx
    cdef struct Plan:
        int operation, space_x, space_y, output, wide, threads, ndim
        i64* shape
        i64 rows, n
        double inverse_temperature, gradient_scale, parameter, factor, total
        Array x, y, weights, temperatures, factors, value, dx, dy, known
        const Sparse* sparse
        int step
    ctypedef void (*RowStep)(const Plan&, i64) noexcept nogil
    cdef struct Isa:
        const char* name
        bint supported
        double (*sum_levels)(double*, i64) noexcept nogil
        void (*elementary_float)(int, const float*, float*, i64) noexcept nogil
        void (*elementary_double)(int, const double*, double*, i64) noexcept nogil
        RowStep classes, slopes_of_x, slopes_of_y
    const Isa* isa_table()
    int _MAX_TASKS "kl::MAX_TASKS"
    cdef struct Task:
        Plan* plan
        int inner_axes
    ctypedef int (*Ask)() noexcept
    atomic[int]& pretended_processors()
    void watch_forks()
    int run_tasks "kl::run"(const Task*, int, const Isa&, Ask) noexcept
    int few_rows "kl::few_at_once"(const Plan&, const Isa&)

cdef extern from *:
    """
    #if defined(_OPENMP)
    static const int kl_openmp = _OPENMP;
    #else
    static const int kl_openmp = 0;
    #endif
    #if defined(__clang__)
    static const char* kl_compiler = "clang " __clang_version__;
    #elif defined(__GNUC__)
    static const char* kl_compiler = "gcc " __VERSION__;
    #elif defined(_MSC_VER)
    #define KL_TEXT_(x) #x
    #define KL_TEXT(x) KL_TEXT_(x)
    static const char* kl_compiler = "msvc " KL_TEXT(_MSC_VER);
    #else
    static const char* kl_compiler = "unknown";
    #endif
    """
    const int kl_openmp
    const char* kl_compiler

ctypedef const Isa* ChosenIsa
cdef atomic[ChosenIsa] _isa           # atomic: one thread may choose while others compute without the GIL
_isa.store(isa_table())               # the one that every processor has, until klcore.backends.cpu chooses

cdef double NAN = float("nan"), INFINITY = float("inf")

# What Python needs from the kernels' headers: code, form and number of arguments of every operation; codes of spaces,
# dtypes and outputs; bytes per dtype; classes per chunk, and the most in rows that are computed several at once; the
# range of temperatures, and the range in which float32 is not computed in double.
OPERATIONS = {
    operation_rows[k].name.decode().lower(): (k, <int>operation_rows[k].form, operation_rows[k].arguments)
    for k in range(OPERATION_COUNT)
}
BY_TERM, BY_RATIO, BY_COST, BY_CLASS = _BY_TERM, _BY_RATIO, _BY_COST, _BY_CLASS
SPACES = {"probs": PROBS, "log_probs": LOG_PROBS, "logits": LOGITS, "counts": COUNTS}
DTYPES = {"float64": FLOAT64, "float32": FLOAT32, "float16": FLOAT16, "bfloat16": BFLOAT16}
SIZES = {code: size_of(code) for code in DTYPES.values()}
OUTPUTS = {"row": PER_ROW, "none": TERMS, "total": TOTAL}
CHUNK, COLUMNS = _CHUNK, _COLUMNS
TEMPERATURES, NARROW_TEMPERATURES = (_COLDEST, _HOTTEST), (_COLDEST_NARROW, _HOTTEST_NARROW)

OPENMP = kl_openmp
COMPILER = kl_compiler.decode()


def instruction_sets():
    """The instruction sets built in, best last, each with whether this processor supports it."""
    cdef const Isa* s = isa_table()
    found = {}
    while s.name != NULL:
        found[s.name.decode()] = bool(s.supported)
        s += 1
    return found


def use_instruction_set(str name):
    """Use this instruction set from now on. The caller has checked that it is supported."""
    cdef const Isa* s = isa_table()
    while s.name != NULL:
        if s.name.decode() == name:
            _isa.store(s)
            return
        s += 1
    raise ValueError(name)


def instruction_set():
    """The instruction set in use."""
    return _isa.load().name.decode()


cdef int _dtype(Py_buffer* v) except -1:
    """The dtype of the elements: a kl::Dtype or, for one number per row, also a kl::WholeNumbers."""
    cdef char c = v.format[0]
    cdef int size = 0
    if c == b"=" or c == b"@" or c == b"<" or c == b"^":
        c = v.format[1]
    if c == b"d":
        return FLOAT64
    if c == b"f":
        return FLOAT32
    if c == b"e":
        return FLOAT16
    if c == b"2":                        # "2x", two opaque bytes
        return BFLOAT16
    while 1 << size < v.itemsize:
        size += 1
    if c in b"bhilq":
        return INT8 + size
    if c in b"?BHILQ":
        return UINT8 + size
    raise TypeError(f"cannot compute with the buffer format {v.format.decode()!r}")


cdef class _Borrowed:
    """Buffers held for one call."""
    cdef Py_buffer view[16]
    cdef int held

    def __dealloc__(self):
        for k in range(self.held):
            PyBuffer_Release(&self.view[k])

    cdef Py_buffer* borrow(self, array, bint write) except NULL:
        cdef Py_buffer* v = &self.view[self.held]
        PyObject_GetBuffer(array, v, PyBUF_STRIDES | PyBUF_FORMAT | (PyBUF_WRITABLE if write else 0))
        self.held += 1
        return v

    cdef int lend(self, array, Array* a, bint classes, bint write) except -1:
        """Fill in `a` from an array of shape batch + (n,), or of shape batch if `classes` is false."""
        cdef Py_buffer* v = self.borrow(array, write)
        cdef int d, ndim = v.ndim - 1 if classes else v.ndim
        a.data = <char*>v.buf
        a.dtype = _dtype(v)
        if classes and a.dtype > BFLOAT16:
            raise TypeError(f"cannot compute with the buffer format {v.format.decode()!r}")
        for d in range(ndim):
            a.batch[d] = v.strides[d]
        if classes:
            a.stride = v.strides[ndim]
        return 0


cdef extern from "Python.h" nogil:
    unsigned long PyThread_get_thread_ident()
    int PyErr_CheckSignals()   # not from cpython.exc, which would raise: here the handler's exception stays set

# Python runs signal handlers only in this thread. Other threads must not ask for the GIL: while Python shuts down, a
# thread that does is ended on the spot, inside code that must not throw, which ends the process.
cdef unsigned long _main = threading.main_thread().ident


def _after_fork():
    global _main
    _main = PyThread_get_thread_ident()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)


cdef int _signals() noexcept with gil:
    """Whether a Python signal handler has raised an exception."""
    return PyErr_CheckSignals() != 0


cdef inline Ask _ask() noexcept:
    if PyThread_get_thread_ident() == _main:
        return _signals
    return NULL


cdef int _end(int found) except -1:
    """Turn what kl::guarded returned into an exception."""
    if found == 1:
        raise MemoryError("klcore could not allocate its working memory, or start a thread with enough stack")
    return -1 if found else 0            # 2: stopped by an exception that is set


cdef int _lay_out(Plan* p, _Borrowed b, int operation, int space_x, int space_y, int output, x, y, weights, value,
                  dx, dy, bint write_gradients, bint wide, temperature, double gradient_scale,
                  int threads, double parameter, double factor) except -1:
    """Fill in a plan."""
    cdef Py_buffer* v
    cdef int d
    memset(p, 0, sizeof(Plan))
    b.lend(x, &p.x, True, False)
    v = &b.view[0]
    p.ndim = v.ndim - 1
    p.n = v.shape[p.ndim]
    p.rows = 1
    for d in range(p.ndim):
        p.shape[d] = v.shape[d]
        p.rows *= v.shape[d]
    if y is not None:
        b.lend(y, &p.y, True, False)
    if weights is not None:
        b.lend(weights, &p.weights, False, False)
    if value is not None:
        b.lend(value, &p.value, output == TERMS, True)
    if dx is not None:
        b.lend(dx, &p.dx, True, write_gradients)
    if dy is not None:
        b.lend(dy, &p.dy, True, write_gradients)
    p.operation = operation
    p.space_x = space_x
    p.space_y = space_y
    p.output = output
    p.wide = wide
    p.threads = threads
    _set_temperature(p, b, temperature)
    p.gradient_scale = gradient_scale
    p.parameter = parameter
    p.factor = factor
    return 0


cdef int _set_temperature(Plan* p, _Borrowed b, temperature) except -1:
    """A number, or an array of the batch shape."""
    if isinstance(temperature, float):
        p.inverse_temperature = 1.0 / <double>temperature
        return 0
    p.inverse_temperature = 1.0
    return b.lend(temperature, &p.temperatures, False, False)


cdef class Planned:
    """A plan, and the arrays that it reads and writes. Created by `plan`."""
    cdef Plan plan
    cdef _Borrowed arrays
    cdef int inner_axes


def plan(int operation, int space_x, int space_y, int output, x, y, weights, value, dx, dy, bint wide,
         temperature, double gradient_scale, int threads, factors, double parameter, double factor, int inner_axes=-1):
    """Describe a computation, for `run`.

    x, y, factors, dx, dy and the terms have the shape batch + (n,). Weights, row values and temperatures (if
    `temperature` is not a float) have the shape batch. Weights and temperatures may have any real dtype; factors are
    float64 or float32. y, weights, factors, value, dx and dy may be None. With inner_axes >= 0 there is one gradient:
    that of an operand broadcast over the last inner_axes batch axes, summed over them.
    """
    cdef Planned c = Planned.__new__(Planned)
    c.arrays = _Borrowed.__new__(_Borrowed)
    _lay_out(&c.plan, c.arrays, operation, space_x, space_y, output, x, y, weights, value, dx, dy, True, wide,
             temperature, gradient_scale, threads, parameter, factor)
    if factors is not None:
        c.arrays.lend(factors, &c.plan.factors, True, False)
    c.inner_axes = inner_axes
    return c


def run(list plans):
    """Compute these plans, at most three, and return the total of the first. All memory is allocated before anything
    is written."""
    cdef Task[3] tasks
    cdef int count = len(plans), k, found
    cdef Planned c
    if not 0 < count <= min(_MAX_TASKS, 3):
        raise ValueError(f"expected 1 to 3 plans, found {count}")
    for k in range(count):
        c = plans[k]
        tasks[k].plan = &c.plan
        tasks[k].inner_axes = c.inner_axes
    cdef Ask ask = _ask()
    with nogil:
        found = run_tasks(tasks, count, _isa.load()[0], ask)
    _end(found)
    c = plans[0]
    return c.plan.total


def is_wide(int operation, int space_x, int space_y, double temperature, double parameter=0.0):
    """Whether float32 is computed in float64.

    It is for counts; for logits if the operation is BY_TERM; for operations BY_CLASS, unless both sides are
    probabilities or both are logits; and for logits at temperatures where float32 has no room for a logarithm, the
    temperature or its inverse. It is for renyi_div without logits, because alpha_div's gradient may leave the range of
    float32 where that of renyi_div does not. And it is for alpha_div of logits if alpha or 1 - alpha is above 1, which
    would multiply the error of the first sweep's shift.
    """
    cdef int form = operation_rows[operation].form
    if space_x == COUNTS or space_y == COUNTS:
        return True
    if form == _BY_CLASS and not (space_x == space_y and space_x != LOG_PROBS):
        return True
    if space_x != LOGITS and space_y != LOGITS:
        return operation == _RENYI_DIV
    if operation == _ALPHA_DIV and not 0 <= parameter <= 2:
        return True
    return form == _BY_TERM or not _COLDEST_NARROW <= temperature <= _HOTTEST_NARROW


cdef object _ndarray = numpy.ndarray
cdef object _empty = numpy.empty
cdef dict _plain_dtypes = {ord("d"): numpy.dtype("float64"), ord("f"): numpy.dtype("float32")}   # by buffer format
cdef enum:
    ROW, SUM, ROWMEAN, BATCHMEAN, MEAN
cdef dict _plain_reductions = {"row": ROW, "sum": SUM, "rowmean": ROWMEAN, "batchmean": BATCHMEAN, "mean": MEAN}
cdef dict _plain_gradients = {None: 0, "x": 1, "y": 2, ("x",): 1, ("y",): 2, ("x", "y"): 3}


def plain(call, int threads):
    """The fast path for common calls: two arrays alike, the classes on the last axis, temperature 1, no weights.

    Takes a klcore.operations.Call and returns what its backend returns. Returns None, without any effect, unless both
    are native float arrays of the same shape and dtype, and contiguous if gradients are wanted. Every other call is
    left to rows.py, which computes it or refuses it.
    """
    (of, x, y, space, axis, words, weights, temperature, return_grad, out, _device, divisor, parameter, factor,
     dtype, cotangent, _ratio, _examples, indices, tail, tail_mass) = <tuple>call
    if type(x) is not _ndarray or type(y) is not _ndarray or type(axis) is not int or axis != -1:
        return None
    if weights is not None or out is not None or dtype is not None or of.is_estimator:
        return None
    if indices is not None or tail is not None or tail_mass is not None:
        return None
    if type(words) is not str or type(temperature) not in (float, int) or temperature != 1.0:
        return None
    found_reduction = _plain_reductions.get(words)
    if found_reduction is None or not (return_grad is None or type(return_grad) is str or type(return_grad) is tuple):
        return None
    try:
        found_wanted = _plain_gradients.get(return_grad)
    except TypeError:                    # a tuple with an unhashable element
        return None
    if found_wanted is None:
        return None
    cdef int reduction = found_reduction, wanted = found_wanted
    if type(space) is str and not of.is_loss:
        space = space, space
        if space[0] not in SPACES:
            return None
    elif type(space) is not tuple or space not in of.pairs or (wanted & 1 and "x" not in of.gradients):
        return None
    if cotangent is not None and reduction == ROW:
        return None
    if divisor is not None and (type(divisor) is not float or not (of.is_loss or reduction == SUM)):
        return None
    cdef int operation = of.code, space_x = SPACES[space[0]], space_y = SPACES[space[1]]
    cdef double denominator = 1.0
    if divisor is not None:
        denominator = divisor
        if not of.is_loss and not 0 <= denominator < INFINITY:
            return None
    cdef Plan p
    cdef _Borrowed b = _Borrowed.__new__(_Borrowed)
    cdef Py_buffer* vx
    cdef Py_buffer* vy
    cdef Task task
    cdef i64 step
    cdef int d, found
    try:
        vx = b.borrow(x, False)
        vy = b.borrow(y, False)
    except (BufferError, ValueError):    # a dtype without a buffer format, such as bfloat16
        return None
    if vx.ndim == 0 or vx.ndim != vy.ndim or vx.format[1] != 0 or vx.format[0] != vy.format[0] or vy.format[1] != 0:
        return None
    dtype = _plain_dtypes.get(vx.format[0])
    if dtype is None:
        return None
    memset(&p, 0, sizeof(Plan))
    p.rows = 1
    p.ndim = vx.ndim - 1
    step = vx.itemsize
    for d in range(p.ndim, -1, -1):
        if vx.shape[d] != vy.shape[d]:
            return None
        if wanted and vx.shape[d] > 1 and (vx.strides[d] != step or vy.strides[d] != step):
            return None
        step *= vx.shape[d]
        if d < p.ndim:
            p.shape[d] = vx.shape[d]
            p.rows *= vx.shape[d]
            p.x.batch[d] = vx.strides[d]
            p.y.batch[d] = vy.strides[d]
    p.n = vx.shape[p.ndim]
    p.x.data, p.y.data = <char*>vx.buf, <char*>vy.buf
    p.x.stride, p.y.stride = vx.strides[p.ndim], vy.strides[p.ndim]
    p.x.dtype = p.y.dtype = _dtype(vx)
    value = dx = dy = None
    if wanted & 1:
        dx = _empty(x.shape, dtype)
        b.lend(dx, &p.dx, True, True)
    if wanted & 2:
        dy = _empty(x.shape, dtype)
        b.lend(dy, &p.dy, True, True)
    if reduction == ROW:
        value = _empty(p.rows if p.ndim == 1 else tuple([p.shape[d] for d in range(p.ndim)]), dtype)
        b.lend(value, &p.value, False, True)
    elif reduction == ROWMEAN:
        denominator = <double>p.rows
    elif reduction == BATCHMEAN:
        denominator = <double>vx.shape[0]
    elif reduction == MEAN:
        denominator = <double>(p.rows * p.n)
    p.operation = operation
    p.space_x, p.space_y = space_x, space_y
    p.output = PER_ROW if reduction == ROW else TOTAL
    p.wide = p.x.dtype == FLOAT64 or is_wide(operation, space_x, space_y, 1.0, parameter)
    p.threads = threads
    p.inverse_temperature = 1.0
    p.parameter, p.factor = parameter, factor
    p.gradient_scale = 1.0 / denominator if denominator != 0 else NAN
    if cotangent is not None:
        p.gradient_scale *= <double>cotangent
    task.plan, task.inner_axes = &p, -1
    cdef Ask ask = _ask()
    with nogil:
        found = run_tasks(&task, 1, _isa.load()[0], ask)
    _end(found)
    if reduction == ROW:
        value = value if p.ndim else value[()]
        if denominator != 1:
            value = value / denominator
    else:
        p.total = p.total / denominator if denominator != 0 else NAN
        value = dtype.type(p.total if p.x.dtype == FLOAT64 else <float>p.total)
    if cotangent is not None:
        return (dx, dy) if wanted == 3 else (dx if wanted == 1 else dy,)
    return value if not wanted else (value, dx, dy) if wanted == 3 else (value, dx if wanted == 1 else dy)


def chunk_sums(values, double[::1] sums):
    """Write the sums of every 1024 values of a real array of any layout, in C order, to `sums`."""
    cdef Plan p
    cdef _Borrowed b = _Borrowed.__new__(_Borrowed)
    cdef Py_buffer* v
    cdef int d, found
    memset(&p, 0, sizeof(Plan))
    b.lend(values, &p.weights, False, False)
    v = &b.view[0]
    p.ndim = v.ndim
    p.rows = 1
    for d in range(p.ndim):
        p.shape[d] = v.shape[d]
        p.rows *= v.shape[d]
    cdef Ask ask = _ask()
    if p.rows:
        with nogil:
            found = sum_chunks(p, _isa.load()[0], &sums[0], ask)
        _end(found)


def add_up(double[::1] values):
    """The sum of `values` in klcore's order of addition; `values` is overwritten."""
    return _isa.load().sum_levels(&values[0], values.shape[0]) if values.shape[0] else 0.0


def elementary(str function, x, out):
    """klcore's log, exp, log1p or expm1 of contiguous float32 or float64 arrays, for the tests."""
    cdef _Borrowed b = _Borrowed.__new__(_Borrowed)
    cdef Py_buffer* vx = b.borrow(x, False)
    cdef Py_buffer* vo = b.borrow(out, True)
    cdef int f = ("log", "exp", "log1p", "expm1").index(function)
    cdef i64 n = vx.len // vx.itemsize
    if vx.len != vo.len or _dtype(vx) != _dtype(vo):
        raise ValueError("x and out differ")
    if _dtype(vx) == FLOAT32:
        with nogil:
            _isa.load().elementary_float(f, <const float*>vx.buf, <float*>vo.buf, n)
    elif _dtype(vx) == FLOAT64:
        with nogil:
            _isa.load().elementary_double(f, <const double*>vx.buf, <double*>vo.buf, n)
    else:
        raise TypeError("float32 or float64 only")


def pretend_processors(int n):
    """Pretend that the machine has `n` processors, so that more threads are used; 0: stop. For the tests."""
    pretended_processors().store(n)


def few_at_once(int operation, int space_x, int space_y, bint wide, i64 rows, i64 n):
    """How many rows of few classes such a call computes together; 0 if one by one. For the tests."""
    cdef Plan p
    memset(&p, 0, sizeof(Plan))
    p.operation, p.space_x, p.space_y, p.wide = operation, space_x, space_y, wide
    p.rows, p.n, p.ndim, p.threads, p.inverse_temperature = rows, n, 1, 1, 1
    p.shape[0] = rows
    return few_rows(p, _isa.load()[0])


# ---- rows in parts: kl_partial.h -------------------------------------------------------------------------------------

cdef extern from "kl_partial.h" namespace "kl" nogil:
    int _MAX_STATS "kl::MAX_STATS"
    int states_of(const Plan&, const Isa&, int)
    int sweep_plan "kl::sweep"(Plan&, const Isa&, int, const double*, double*, int, Ask) noexcept
    int merge_plan "kl::merge"(Plan&, const Isa&, int, double*, i64, double*, bint, Ask) noexcept
    int sum_chunks "kl::chunk_sums"(Plan&, const Isa&, double*, Ask) noexcept

MAX_STATS = _MAX_STATS


def sweeps(int operation, int space_x, int space_y, bint wide, bint terms, bint gradient, bint factors=False):
    """How many doubles a chunk of 1024 classes leaves in each sweep over the rows that these outputs need."""
    cdef Plan p
    cdef char mark
    memset(&p, 0, sizeof(Plan))
    p.operation, p.space_x, p.space_y, p.wide = operation, space_x, space_y, wide
    p.output = TERMS if terms else TOTAL
    p.dx.data = &mark if gradient else NULL
    p.factors.data = &mark if factors else NULL
    found = []
    while states_of(p, _isa.load()[0], len(found)) >= 0:
        found.append(states_of(p, _isa.load()[0], len(found)))
    return tuple(found)


def sweep(int number, int operation, int space_x, int space_y, x, y, weights, terms, dx, dy, bint wide,
          temperature, double gradient_scale, int threads, double parameter, double factor,
          const double[::1] stats, double[::1] states, int inner_axes=-1):
    """One of these sweeps over a block of the classes.

    Arrays are as in `plan`. `stats` holds MAX_STATS numbers per row from the earlier sweeps, or is None in the first.
    `states` holds, per row, `sweeps()[number]` lines of one double per chunk, initially zero. If it is given, only
    `states` is written, and dx and dy say which gradients will be requested. Without it, the given outputs are written.
    """
    cdef Plan p
    cdef _Borrowed b = _Borrowed.__new__(_Borrowed)
    cdef int found
    cdef const double* known = &stats[0] if stats is not None and stats.shape[0] else NULL
    cdef double* left = &states[0] if states is not None and states.shape[0] else NULL
    if states is not None and left == NULL:
        return
    _lay_out(&p, b, operation, space_x, space_y, TOTAL if terms is None else TERMS, x, y, weights, terms, dx, dy,
             left == NULL, wide, temperature, gradient_scale, threads, parameter, factor)
    cdef Ask ask = _ask()
    with nogil:
        found = sweep_plan(p, _isa.load()[0], number, known, left, inner_axes, ask)
    _end(found)


def merge(int number, int operation, int space_x, int space_y, weights, bint wide, temperature, int threads,
          double parameter, double factor, double[::1] states, i64 count, double[::1] into, bint fold=False):
    """Merge the states that a sweep left of all blocks, `count` doubles per line, into the rows' stats.

    Overwrites the states. A row's stats begin with its value, once it is known, times its weight. `weights`, and a
    temperature that is not a float, have the batch shape. With `fold`, merges at least one state per row into one
    state per row, initially zero.
    """
    cdef Plan p
    cdef _Borrowed b = _Borrowed.__new__(_Borrowed)
    cdef Py_buffer* v
    cdef int d, found
    if not into.shape[0]:
        return
    memset(&p, 0, sizeof(Plan))
    p.operation, p.space_x, p.space_y, p.wide = operation, space_x, space_y, wide
    p.output = TOTAL
    p.ndim = 1
    p.rows = p.shape[0] = into.shape[0] // (states_of(p, _isa.load()[0], number) if fold else MAX_STATS)
    if weights is not None:
        b.lend(weights, &p.weights, False, False)
    _set_temperature(&p, b, temperature)
    if b.held:
        v = &b.view[0]
        p.ndim = v.ndim
        for d in range(p.ndim):
            p.shape[d] = v.shape[d]
    p.threads = threads
    p.parameter, p.factor = parameter, factor
    cdef Ask ask = _ask()
    with nogil:
        found = merge_plan(p, _isa.load()[0], number, &states[0] if states.shape[0] else NULL, count, &into[0],
                           fold, ask)
    _end(found)


# ---- rows in which x lists some classes: kl_sparse_batch.h -----------------------------------------------------------

cdef extern from "kl_sparse_batch.h" namespace "kl" nogil:
    int sort_all(const Plan&, Ask) noexcept
    int step_all(const Plan&, RowStep, Ask) noexcept

TAILS = {"bucket": _BUCKET, "zero": _ZERO, "renorm": _RENORM}
ROW_NUMBERS, NORM_STATES = _ROW_NUMBERS, _NORM_STATES
MOST_CLASSES, PLACE_OF_KEY = _OUTSIDE, _PLACE_OF_KEY   # what keys have room for; a key's bits that are its place


cdef class Listed:
    """A call in which x lists classes of y, with the intermediate results of its steps.

    x and indices have the shape batch + (K,), y has the shape batch + (n,). tail_mass (or None), `weights` and a
    temperature that is not a float have the shape batch; indices are int64. `xs` and `ys` are the K + 1 classes, of the
    shape batch + (K + 1,).
    """
    cdef Plan plan
    cdef Sparse sparse
    cdef _Borrowed arrays
    cdef readonly object keys, known, xs, ys
    cdef object batch

    def __init__(self, x, indices, y, weights, temperature, tail_mass, int space_x, int space_y, int tail, int threads):
        cdef _Borrowed b = _Borrowed.__new__(_Borrowed)
        cdef Sparse* s = &self.sparse
        cdef int d, found
        self.arrays = b
        _lay_out(&self.plan, b, 0, 0, 0, TOTAL, y, None, weights, None, None, None, False, False, temperature, 1.0,
                 threads, 0.0, 1.0)
        self.plan.wide = self.plan.x.dtype == FLOAT64
        self.batch = batch = tuple([self.plan.shape[d] for d in range(self.plan.ndim)])
        b.lend(x, &s.x, True, False)
        b.lend(indices.view(numpy.float64), &s.indices, True, False)   # eight bytes each
        s.count = x.shape[x.ndim - 1]
        if tail_mass is not None:
            b.lend(tail_mass, &s.tail_mass, False, False)
        s.space_x, s.space_y, s.tail = space_x, space_y, tail
        self.keys = numpy.zeros((*batch, s.count), numpy.uint64)
        self.known = numpy.zeros((*batch, ROW_NUMBERS))
        self.xs, self.ys = numpy.zeros((*batch, s.count + 1)), numpy.zeros((*batch, s.count + 1))
        s.keys = <Key*>b.borrow(self.keys, True).buf
        s.xs = <double*>b.borrow(self.xs, True).buf
        s.ys = <double*>b.borrow(self.ys, True).buf
        b.lend(self.known, &self.plan.known, True, True)
        s.known = <double*>self.plan.known.data
        self.plan.sparse = s
        cdef Ask ask = _ask()
        cdef Plan sweep = self.plan        # a copy, because `run` merges batch axes
        sweep.step = SUM_OTHERS
        cdef Task task
        task.plan, task.inner_axes = &sweep, -1
        with nogil:
            found = sort_all(self.plan, ask)
            if found == 0 and tail != _RENORM:
                found = run_tasks(&task, 1, _isa.load()[0], ask)
            if found == 0:
                found = step_all(self.plan, _isa.load().classes, ask)
        _end(found)

    def by_x(self, dxs):
        """The derivatives with respect to x, as float64 of the shape batch + (K,), from those with respect to `xs`."""
        cdef _Borrowed b = _Borrowed.__new__(_Borrowed)
        dx = numpy.zeros((*self.batch, self.sparse.count))
        self.sparse.slopes, self.sparse.dx = <double*>b.borrow(dxs, False).buf, <double*>b.borrow(dx, True).buf
        self._step(_isa.load().slopes_of_x)
        return dx

    def by_y(self, dys):
        """Turn the derivatives with respect to `ys`, in place, into those with respect to the listed classes of y and
        the common one of all other classes."""
        cdef _Borrowed b = _Borrowed.__new__(_Borrowed)
        self.sparse.slopes = <double*>b.borrow(dys, True).buf
        self._step(_isa.load().slopes_of_y)

    cdef int _step(self, RowStep step) except -1:
        cdef Ask ask = _ask()
        cdef int found
        with nogil:
            found = step_all(self.plan, step, ask)
        return _end(found)

    def spread(self, dys, y, weights, temperature, known, dy, int inner_axes):
        """Write the derivative with respect to y, from what `by_y` left in dys. Arrays are those of the call, with the
        batch axes in the order of dy's; with inner_axes >= 0 it is summed over that many of the last."""
        cdef Plan p
        cdef _Borrowed b = _Borrowed.__new__(_Borrowed)
        cdef bint wide = self.plan.wide
        _lay_out(&p, b, 0, 0, 0, TOTAL, y, None, weights, None, None, dy, True, wide, temperature, 1.0,
                 self.plan.threads, 0.0, 1.0)
        self.sparse.slopes = <double*>b.borrow(dys, False).buf
        b.lend(known, &p.known, True, False)
        p.sparse, p.step = &self.sparse, SPREAD
        _run_one(&p, inner_axes)

    def copy(self, values, dx, int inner_axes):
        """Copy float64 values to a gradient, or sum them over the last batch axes."""
        cdef Plan p
        cdef _Borrowed b = _Borrowed.__new__(_Borrowed)
        _lay_out(&p, b, 0, 0, 0, TOTAL, values, None, None, None, dx, None, True, True, 1.0, 1.0, self.plan.threads,
                 0.0, 1.0)
        p.sparse, p.step = &self.sparse, COPY
        _run_one(&p, inner_axes)


cdef int _run_one(Plan* p, int inner_axes) except -1:
    cdef Task task
    cdef Ask ask = _ask()
    cdef int found
    task.plan, task.inner_axes = p, inner_axes
    with nogil:
        found = run_tasks(&task, 1, _isa.load()[0], ask)
    return _end(found)


watch_forks()
