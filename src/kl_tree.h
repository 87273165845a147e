// The order of addition, "numerics v1": part of klcore's contract, shared by the CPU and the GPU. Written out in
// docs/maths.md; whoever changes a line here changes the bits of every result.
//
//   chunk   1024 consecutive elements of a row. Element i of the chunk stands in column i mod 128.
//   column  its (at most) eight elements, in the precision of the input, as ((0+1)+(2+3)) + ((4+5)+(6+7)).
//   fold    the 128 column sums, widened to double: column j takes column j + 64, then + 32, ... , then + 1.
//   above   the totals of 1024 chunks are summed by the same rule, and so on upwards, until one number is left;
//           rows are added to a batch total likewise, each row's total being one element.
// A missing element counts as +0, and adding +0 changes nothing, so short rows may skip it.
#pragma once

namespace kl {

constexpr int COLUMNS = 128;
constexpr int CHUNK = 1024;

// the sum of the first N elements of a column whose elements lie COLUMNS apart
template <int N> struct Column {
  static constexpr int half = N > 4 ? 4 : N > 2 ? 2 : 1;
  template <typename T> static KL_FN T sum(const T* t) {
    return Column<half>::sum(t) + Column<N - half>::sum(t + half * COLUMNS);
  }
};
template <> struct Column<1> {
  template <typename T> static KL_FN T sum(const T* t) { return t[0]; }
};

}  // namespace kl
