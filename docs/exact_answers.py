"""Prints klcore/exact.py: divergences and derivatives for `python -m klcore --selftest`, from the definition by mpmath.

Run as: python docs/exact_answers.py > klcore/exact.py
"""

from itertools import product

import mpmath

DIGITS = 80  # of which differentiation by differences loses half
SPACES = ("probs", "log_probs", "logits")


def probabilities(numbers, space):
    """What three classes in a space stand for."""
    numbers = [mpmath.mpf(v) for v in numbers]
    if space == "probs":
        return numbers
    powers = [mpmath.exp(v) for v in numbers]
    total = mpmath.fsum(powers) if space == "logits" else 1
    return [v / total for v in powers]


def kl_div(x, y, pair):
    p, q = probabilities(x, pair[0]), probabilities(y, pair[1])
    return mpmath.fsum(a * mpmath.log(a / b) - a + b for a, b in zip(p, q, strict=True))


def derivatives(x, y, pair):
    """Of the divergence, by each of the six numbers."""
    both = [*x, *y]
    orders = [tuple(int(i == k) for i in range(6)) for k in range(6)]
    return [mpmath.diff(lambda *v: kl_div(v[:3], v[3:], pair), both, order) for order in orders]


def inputs(pair):
    """Pairs of rows of three, all exact in float32: from close to far apart."""
    x = {"probs": (1 / 2, 5 / 16, 3 / 16), "log_probs": (-5 / 8, -9 / 8, -7 / 4), "logits": (3 / 4, -1 / 2, 9 / 8)}[
        pair[0]
    ]
    if pair[0] == pair[1]:
        for octaves in (20, 16, 12, 8, 4):
            yield x, tuple(v + k * 2.0**-octaves for v, k in zip(x, (1, -1, 0.5), strict=True))
        if pair[0] == "probs":
            yield x, (3 / 16, 2.0**-40, 1 / 2)
            yield (16.0, 2.0, 1.0), (2.0**-90, 2.0, 1.0)
        else:
            yield x, (-9.0, -1 / 8, -40.0)
            yield x, (-1000.0, -1500.0, -1 / 8)
    elif pair[1] == "probs":
        yield x, (3 / 8, 3 / 8, 1 / 4)
        yield x, (2.0**-30, 3 / 4, 2.0**-50)
    else:
        yield x, (-1 / 2, -5 / 4, -7 / 8)
        yield x, (-20.0, -30.0, -1 / 64)


def table():
    yield '"""Divergences and derivatives of three classes, for selftest.py; printed by docs/exact_answers.py."""\n'
    yield "# space of x, space of y, x, y, KL(x || y), derivatives by x, derivatives by y; 20 digits"
    yield "ANSWERS = ("
    with mpmath.workdps(DIGITS):
        for pair in product(SPACES, SPACES):
            for x, y in inputs(pair):
                numbers = [mpmath.nstr(v, 20) for v in (kl_div(x, y, pair), *derivatives(x, y, pair))]
                yield f'    ("{pair[0]}", "{pair[1]}", {x}, {y},'
                yield f"     {numbers[0]}, ({', '.join(numbers[1:4])}),"
                yield f"     ({', '.join(numbers[4:])})),"
    yield ")  # fmt: skip"


if __name__ == "__main__":
    print("\n".join(table()))
