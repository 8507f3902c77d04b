// Turns Python integers into the structs of crossfade.h, and nothing else. Python checks the
// arguments: see python/crossfade/ops/check.py and native.py.
#include <new>
#include <stdexcept>
#include <vector>

#include "bind_tape.h"
#include "bindings.h"

namespace crossfade {
namespace {

// [(address, row stride, dtype code), ...]
int32_t read_matrices(py::handle list, Matrix* out) {
  int32_t count = 0;
  for (py::handle item : list) {
    const auto t = py::reinterpret_borrow<py::tuple>(item);
    out[count++] = {pointer<void>(t[0]), t[1].cast<int64_t>(),
                    static_cast<DType>(t[2].cast<int>())};
  }
  return count;
}

// [address, row stride] of a float32 tensor, or a tuple of numbers
Weights read_weights(py::handle object) {
  Weights w{};
  if (PyList_Check(object.ptr())) {
    const auto t = py::reinterpret_borrow<py::list>(object);
    w.rows = pointer<float>(t[0]);
    w.row_stride = t[1].cast<int64_t>();
  } else {
    int k = 0;
    for (py::handle x : object) w.all[k++] = x.cast<float>();
  }
  return w;
}

// [address] of a tensor, or a number
template <class T>
PerRow<T> read_setting(py::handle object) {
  if (PyList_Check(object.ptr()))
    return {pointer<T>(py::reinterpret_borrow<py::list>(object)[0]), T{}};
  if constexpr (std::is_same_v<T, int64_t>)  // seeds and streams use all 64 bits
    return {nullptr, static_cast<int64_t>(PyLong_AsUnsignedLongLongMask(object.ptr()))};
  else
    return {nullptr, object.cast<T>()};
}

// (rows, vocab, terms, values, weights, value weights, power, support, mask address, mask stride,
// parts: [(weights, power, min, max), ...], address of log_z)
Blend read_blend(const py::tuple& t) {
  Blend b{};
  b.rows = t[0].cast<int64_t>();
  b.vocab = t[1].cast<int64_t>();
  b.terms = read_matrices(t[2], b.term);
  b.values = read_matrices(t[3], b.value);
  b.weight = read_weights(t[4]);
  b.value_weight = read_weights(t[5]);
  b.power = t[6].cast<float>();
  b.support.term = -1;
  if (!t[7].is_none()) {
    const auto s = py::reinterpret_borrow<py::tuple>(t[7]);
    b.support = {s[0].cast<int32_t>(), s[1].cast<int64_t>(), s[2].cast<float>(),
                 s[3].cast<float>()};
  }
  b.mask = pointer<uint8_t>(t[8]);
  b.mask_stride = t[9].cast<int64_t>();
  for (py::handle item : t[10]) {
    const auto p = py::reinterpret_borrow<py::tuple>(item);
    b.part[b.parts++] = {read_weights(p[0]), p[1].cast<float>(), p[2].cast<float>(),
                         p[3].cast<float>()};
  }
  b.log_z = pointer<float>(t[11]);
  return b;
}

// (do_sample, temperature, top_p, min_p, top_k, seed, stream, step, addresses of the five outputs,
// first token, address of shards)
Sampling read_sampling(const py::tuple& t) {
  return {t[0].cast<bool>(),           read_setting<float>(t[1]),   read_setting<float>(t[2]),
          read_setting<float>(t[3]),   read_setting<int64_t>(t[4]), read_setting<int64_t>(t[5]),
          read_setting<int64_t>(t[6]), read_setting<int64_t>(t[7]), pointer<int64_t>(t[8]),
          pointer<float>(t[9]),        pointer<float>(t[10]),       pointer<float>(t[11]),
          pointer<float>(t[12]),       t[13].cast<int64_t>(),       pointer<Shard>(t[14])};
}

// [(address, strides, heads, length, size, bytes of a number), ...]
std::vector<Cache> read_caches(const py::list& list) {
  std::vector<Cache> caches;
  for (py::handle item : list) {
    const auto t = py::reinterpret_borrow<py::tuple>(item);
    caches.push_back({read_heads(t), t[2].cast<int64_t>(), t[3].cast<int64_t>(),
                      t[4].cast<int64_t>(), t[5].cast<int32_t>()});
  }
  return caches;
}

// (rows, address of parents, start, end)
Fork read_fork(const py::tuple& t, const std::vector<Cache>& caches) {
  return {t[0].cast<int64_t>(),
          caches.data(),
          static_cast<int64_t>(caches.size()),
          pointer<int64_t>(t[1]),
          read_setting<int64_t>(t[2]),
          read_setting<int64_t>(t[3])};
}

// (prompts, slots, width, addresses of scores, finished and parents)
Selection read_selection(const py::tuple& t) {
  return {t[0].cast<int64_t>(), t[1].cast<int64_t>(),   t[2].cast<int64_t>(),
          pointer<float>(t[3]), pointer<uint8_t>(t[4]), pointer<int64_t>(t[5])};
}

// (rows, columns, first, addresses of scores and bias, softcap, temperature, address of targets)
LogpTile read_logp_tile(const py::tuple& t) {
  return {t[0].cast<int64_t>(), t[1].cast<int64_t>(), t[2].cast<int64_t>(), pointer<float>(t[3]),
          pointer<float>(t[4]), t[5].cast<float>(),   t[6].cast<float>(),   pointer<int64_t>(t[7])};
}

// (count, size, addresses of first, second and second scores)
LogpMoments read_logp_moments(const py::tuple& t) {
  return {t[0].cast<int32_t>(), t[1].cast<int64_t>(), pointer<float>(t[2]), pointer<float>(t[3]),
          pointer<float>(t[4])};
}

// The Python error that std::bad_alloc becomes. It is never released.
PyObject* out_of_memory = nullptr;

void translate(std::exception_ptr thrown) {
  try {
    if (thrown) std::rethrow_exception(thrown);
  } catch (const std::bad_alloc&) {
    PyErr_SetString(out_of_memory ? out_of_memory : PyExc_MemoryError,
                    "out of memory: a native kernel got no room to work in");
  }
}

#ifdef CROSSFADE_CUDA
void check(const char* error) {
  if (error) throw std::runtime_error(error);
}
#endif

}  // namespace

PYBIND11_MODULE(_native, m) {
  py::register_local_exception_translator(translate);
  m.def("out_of_memory_is",
        [](py::object type) { out_of_memory = std::move(type).release().ptr(); });
  m.def("cpu_isa", &cpu_isa);
  m.def("blend_cpu", [](const py::tuple& blend, uintptr_t out, bool raw, int threads) {
    const Blend b = read_blend(blend);
    py::gil_scoped_release release;
    blend_cpu(b, reinterpret_cast<float*>(out), raw, threads);
  });
  m.def("blend_sample_cpu", [](const py::tuple& blend, const py::tuple& sampling, int threads) {
    const Blend b = read_blend(blend);
    const Sampling s = read_sampling(sampling);
    py::gil_scoped_release release;
    blend_sample_cpu(b, s, threads);
  });
  m.def("attention_cpu", [](const py::tuple& attention, int threads) {
    const Attention a = read_attention(attention);
    py::gil_scoped_release release;
    attention_cpu(a, threads);
  });
  // It takes plain numbers: it is called for each layer and token, and a tuple would cost more.
  m.def("linear_cpu",
        [](int64_t rows, int64_t in, int64_t out, int dtype, uintptr_t x, int64_t x_stride,
           uintptr_t weight, int64_t weight_stride, uintptr_t bias, uintptr_t y,
           const py::object& lora, const py::object& packed, int threads) {
          const Linear l = read_linear(rows, in, out, static_cast<DType>(dtype), x, x_stride,
                                       weight, weight_stride, bias, y, lora, packed);
          py::gil_scoped_release release;
          linear_cpu(l, threads);
        });
  m.def("logp_forward_cpu",
        [](const py::tuple& tile, uintptr_t sums, const py::tuple& moments, int threads) {
          const LogpTile t = read_logp_tile(tile);
          const LogpMoments m = read_logp_moments(moments);
          py::gil_scoped_release release;
          logp_forward_cpu(t, reinterpret_cast<LogpSums*>(sums), m, threads);
        });
  m.def("logp_backward_cpu", [](const py::tuple& tile, uintptr_t gradients, int threads) {
    const LogpTile t = read_logp_tile(tile);
    py::gil_scoped_release release;
    logp_backward_cpu(t, reinterpret_cast<LogpGradient*>(gradients), threads);
  });
  m.def("chunk_select_cpu", [](const py::tuple& selection) {
    const Selection s = read_selection(selection);
    py::gil_scoped_release release;
    chunk_select_cpu(s);
  });
  m.def("fork_cache_cpu", [](const py::tuple& fork, const py::list& list, int threads) {
    const std::vector<Cache> caches = read_caches(list);
    const Fork f = read_fork(fork, caches);
    py::gil_scoped_release release;
    fork_cache_cpu(f, threads);
  });

  bind_tape(m);

#ifdef CROSSFADE_CUDA
  m.attr("cuda_architectures") = CROSSFADE_CUDA_ARCHITECTURES;
  m.def("blend_cuda",
        [](const py::tuple& blend, uintptr_t out, bool raw, int device, uintptr_t stream) {
          check(blend_cuda(read_blend(blend), reinterpret_cast<float*>(out), raw, device,
                           reinterpret_cast<void*>(stream)));
        });
  m.def("blend_sample_cuda",
        [](const py::tuple& blend, const py::tuple& sampling, int device, uintptr_t stream) {
          check(blend_sample_cuda(read_blend(blend), read_sampling(sampling), device,
                                  reinterpret_cast<void*>(stream)));
        });
  m.def("chunk_select_cuda", [](const py::tuple& selection, int device, uintptr_t stream) {
    check(chunk_select_cuda(read_selection(selection), device, reinterpret_cast<void*>(stream)));
  });
  m.def("fork_cache_cuda",
        [](const py::tuple& fork, const py::list& list, int device, uintptr_t stream) {
          const std::vector<Cache> caches = read_caches(list);
          check(fork_cache_cuda(read_fork(fork, caches), device, reinterpret_cast<void*>(stream)));
        });
#else
  m.attr("cuda_architectures") = py::none();
#endif
}

}  // namespace crossfade
