// Expert-major order of the slots of tokens on a CPU; the twin of the reference in unimega/kernels/expert_order.py.
//
// A part of the extension of data_index.cpp. Tensors come as addresses: no torch headers, and no array is made.

#include <pybind11/pybind11.h>

#include <cstdint>
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

}  // namespace

void add_routing(py::module_& module) {
    module.def("expert_order", &expert_order, py::arg("experts"), py::arg("slots"), py::arg("num_experts"), py::arg("offsets"),
               py::arg("place"), py::arg("source"),
               "Addresses of int32: experts [slots] in; offsets [num_experts + 1], place [slots], source [slots] out.");
}
