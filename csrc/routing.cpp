// The best experts of tokens, and the expert-major order of their slots, on a CPU; the twins of the references in
// unimega/kernels/topk_routing.py and expert_order.py.
//
// A part of the extension of data_index.cpp. Tensors come as addresses: no torch headers, and no array is made.

#include <pybind11/pybind11.h>

#include <cstdint>
#include <cstring>
#include <numeric>
#include <vector>

namespace py = pybind11;

namespace {

// Counting sort in two passes. Any id outside of [0, experts) is no expert and comes last.
void expert_order(std::uintptr_t experts_address, std::int64_t slots, std::int64_t experts, std::uintptr_t offsets_address,
                  std::uintptr_t place_address, std::uintptr_t source_address) {
    if (slots < 0 || slots > INT32_MAX || experts < 1 || experts > INT32_MAX / 8) throw py::value_error("sizes do not fit int32");
    const auto* ids = reinterpret_cast<const std::uint32_t*>(experts_address);
    auto* offsets = reinterpret_cast<std::int32_t*>(offsets_address);
    auto* place = reinterpret_cast<std::int32_t*>(place_address);
    auto* source = reinterpret_cast<std::int32_t*>(source_address);
    py::gil_scoped_release unlocked;
    const auto none = static_cast<std::uint32_t>(experts);
    const auto bucket = [none](std::uint32_t id) { return id < none ? id : none; };
    // Four counts of each expert: neighbours of one expert would wait for each other's increment.
    std::vector<std::int32_t> counts(4 * (experts + 1));
    for (std::int64_t slot = 0; slot < slots; ++slot) ++counts[4 * bucket(ids[slot]) + (slot & 3)];
    std::vector<std::int32_t> next(experts + 1);
    std::int32_t before = 0;
    for (std::int64_t e = 0; e <= experts; ++e) {
        offsets[e] = next[e] = before;
        before = std::accumulate(&counts[4 * e], &counts[4 * e] + 4, before);
    }
    for (std::int64_t slot = 0; slot < slots; ++slot) {
        const std::int32_t row = next[bucket(ids[slot])]++;
        place[slot] = row;
        source[row] = static_cast<std::int32_t>(slot);
    }
}

// Numbers of the k largest of each row, best first, ties to the lowest. Keys are compared as integers that order like
// the floats, NaN beyond the infinities: any k different numbers come out, whatever the keys.
void topk(std::uintptr_t keys_address, std::int64_t rows, std::int64_t width, std::int64_t k, std::uintptr_t out_address) {
    if (rows < 0 || k < 1 || width < k || width > INT32_MAX) throw py::value_error("k does not lie in 1..width");
    const auto* keys = reinterpret_cast<const float*>(keys_address);
    auto* out = reinterpret_cast<std::int32_t*>(out_address);
    py::gil_scoped_release unlocked;
    std::vector<std::int32_t> ordered(width), best(k);
    for (std::int64_t row = 0; row < rows; ++row, keys += width, out += k) {
        for (std::int64_t i = 0; i < width; ++i) {
            const float key = keys[i] + 0.0f;  // -0 becomes 0
            std::int32_t bits;
            std::memcpy(&bits, &key, sizeof bits);
            ordered[i] = bits ^ ((bits >> 31) & INT32_MAX);
        }
        for (std::int64_t i = 0; i < width; ++i) {
            if (i >= k && ordered[i] <= best[k - 1]) continue;
            std::int64_t place = i < k ? i : k - 1;
            for (; place > 0 && best[place - 1] < ordered[i]; --place) {
                best[place] = best[place - 1];
                out[place] = out[place - 1];
            }
            best[place] = ordered[i];
            out[place] = static_cast<std::int32_t>(i);
        }
    }
}

}  // namespace

void add_routing(py::module_& module) {
    module.def("expert_order", &expert_order, py::arg("experts"), py::arg("slots"), py::arg("num_experts"), py::arg("offsets"),
               py::arg("place"), py::arg("source"),
               "Addresses of int32: experts [slots] in; offsets [num_experts + 1], place [slots], source [slots] out.");
    module.def("topk", &topk, py::arg("keys"), py::arg("rows"), py::arg("width"), py::arg("k"), py::arg("out"),
               "Addresses: keys, fp32 [rows, width], in; numbers of the k largest of each row, int32 [rows, k], out.");
}
