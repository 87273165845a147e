// The order of addition, "numerics v2": part of klcore's contract, shared by the CPU and the GPU. It is specified in
// docs/maths.md; changing a line here changes the bits of every result.
//
//   chunk   1024 consecutive elements of a row. Element i of the chunk belongs to column i mod 128.
//   column  its (at most) eight elements are added one after the other, in the precision of the input: starting from 0,
//           sum = sum + element, or sum = fma(weight, number, sum) if the element is a product.
//   fold    the 128 column sums are widened to double; column j takes column j + 64, then + 32, ... , then + 1.
//   above   the totals of 1024 chunks are summed by the same rule, and so on upwards, until one number is left. A batch total
//           is summed in the same way, each row's total being one element.
// A missing element counts as +0, and adding +0 changes nothing, so short rows may skip it.
#pragma once

namespace kl {

constexpr int COLUMNS = 128;
constexpr int CHUNK = 1024;

}  // namespace kl
