// What Python integers become in more than one file of bindings.
#pragma once
#include <pybind11/pybind11.h>

#include "crossfade.h"

namespace py = pybind11;

namespace crossfade {

template <class T>
T* pointer(py::handle address) {
  return reinterpret_cast<T*>(address.cast<uintptr_t>());
}

// (address, strides): of a [rows, heads, tokens, size] tensor
inline Heads read_heads(py::handle object) {
  const auto t = py::reinterpret_borrow<py::tuple>(object);
  const auto s = py::reinterpret_borrow<py::tuple>(t[1]);
  return {pointer<void>(t[0]), s[0].cast<int64_t>(), s[1].cast<int64_t>(), s[2].cast<int64_t>()};
}

// (dtype code, the shapes' eight numbers, query, key, value, keys, values, addresses of lengths and
// cache rows, scale, softcap, window, output): the fields of Attention in their order
inline Attention read_attention(const py::tuple& t) {
  Attention a{};
  a.dtype = static_cast<DType>(t[0].cast<int>());
  int64_t* const shape[] = {&a.rows, &a.tokens,     &a.heads,      &a.kv_heads,
                            &a.size, &a.value_size, &a.cache_rows, &a.capacity};
  for (int i = 0; i < 8; ++i) *shape[i] = t[1 + i].cast<int64_t>();
  Heads* const tensors[] = {&a.query, &a.key, &a.value, &a.keys, &a.values};
  for (int i = 0; i < 5; ++i) *tensors[i] = read_heads(t[9 + i]);
  a.lengths = pointer<int64_t>(t[14]);
  a.cache_row = pointer<int64_t>(t[15]);
  a.scale = t[16].cast<float>();
  a.softcap = t[17].cast<float>();
  a.window = t[18].cast<int64_t>();
  a.out = read_heads(t[19]);
  return a;
}

// `lora`: None, or (rank, address of a, row stride, of b, row stride, of scale, row stride, rows of
// x to a row of scale)
inline Linear read_linear(int64_t rows, int64_t in, int64_t out, DType dtype, uintptr_t x,
                          int64_t x_stride, uintptr_t weight, int64_t weight_stride, uintptr_t bias,
                          uintptr_t y, const py::object& lora) {
  Linear l{};
  l.rows = rows;
  l.in = in;
  l.out = out;
  l.x = {reinterpret_cast<void*>(x), x_stride, dtype};
  l.weight = {reinterpret_cast<void*>(weight), weight_stride, dtype};
  l.bias = reinterpret_cast<void*>(bias);
  l.y = reinterpret_cast<void*>(y);
  if (lora.is_none()) return l;
  const auto t = py::reinterpret_borrow<py::tuple>(lora);
  l.rank = t[0].cast<int64_t>();
  l.a = {pointer<void>(t[1]), t[2].cast<int64_t>(), dtype};
  l.b = {pointer<void>(t[3]), t[4].cast<int64_t>(), dtype};
  l.scale = pointer<float>(t[5]);
  l.scale_stride = t[6].cast<int64_t>();
  l.scale_rows = t[7].cast<int64_t>();
  return l;
}

}  // namespace crossfade
