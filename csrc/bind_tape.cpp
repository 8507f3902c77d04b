// Turns Python integers into the instructions of a tape. decoding/engine/tape/ writes them.
#include "bind_tape.h"

#include <pybind11/stl.h>

#include "bindings.h"
#include "cpu/tape.h"

namespace crossfade {
namespace {

// (base, kind, offset, strides)
TapeTensor read_tensor(py::handle object) {
  const auto t = py::reinterpret_borrow<py::tuple>(object);
  TapeTensor x{t[0].cast<int32_t>(), static_cast<Kind>(t[1].cast<int>()), t[2].cast<int64_t>(), {}};
  int d = 0;
  for (py::handle stride : t[3]) x.stride[d++] = stride.cast<int64_t>();
  return x;
}

// (op, wait, index, shape, numbers, operands), of which the first operand is the result
TapeInstruction read_instruction(const py::tuple& t) {
  TapeInstruction i{};
  i.op = static_cast<TapeOp>(t[0].cast<int>());
  i.wait = t[1].cast<bool>();
  i.index = t[2].cast<int64_t>();
  int d = 0;
  for (py::handle size : t[3]) i.shape[d++] = size.cast<int64_t>();
  d = 0;
  for (py::handle number : t[4]) i.number[d++] = number.cast<float>();
  i.inputs = -1;
  for (py::handle operand : t[5]) {
    (i.inputs < 0 ? i.out : i.in[i.inputs]) = read_tensor(operand);
    ++i.inputs;
  }
  return i;
}

}  // namespace

void bind_tape(py::module_& m) {
  py::class_<Tape>(m, "Tape")
      .def(py::init<>())
      .def("__len__", [](const Tape& tape) { return tape.instructions.size(); })
      .def("add",
           [](Tape& tape, const py::tuple& given) {
             tape.instructions.push_back(read_instruction(given));
           })
      .def("add_linear",
           [](Tape& tape, int64_t rows, int64_t in, int64_t out, int dtype, int64_t x_stride,
              uintptr_t weight, int64_t weight_stride, uintptr_t bias, const py::object& lora) {
             tape.linears.push_back(read_linear(rows, in, out, static_cast<DType>(dtype), 0,
                                                x_stride, weight, weight_stride, bias, 0, lora));
             return tape.linears.size() - 1;
           })
      .def("add_attention",
           [](Tape& tape, const py::tuple& attention) {
             tape.attentions.push_back(read_attention(attention));
             return tape.attentions.size() - 1;
           })
      // Bytes of memory that a product needs beside its operands.
      .def("scratch",
           [](const Tape& tape, size_t index) { return linear_scratch(tape.linears.at(index)); })
      // Caches may move and grow between runs. Each is (address, strides).
      .def("set_cache",
           [](Tape& tape, size_t index, py::handle keys, py::handle values, int64_t capacity) {
             Attention& a = tape.attentions.at(index);
             a.keys = read_heads(keys);
             a.values = read_heads(values);
             a.capacity = capacity;
           })
      .def("run", [](const Tape& tape, const std::vector<uintptr_t>& bases, int64_t begin,
                     int64_t end, int threads) {
        py::gil_scoped_release release;
        tape_run_cpu(tape, reinterpret_cast<char* const*>(bases.data()), begin, end, threads);
      });
}

}  // namespace crossfade
