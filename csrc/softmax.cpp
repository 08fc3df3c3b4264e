// The two passes of a softmax over logits [vocabulary, tokens] on a CPU; the twins of those in torch in
// unimega/kernels/linear_cross_entropy_cpu.py.
//
// An extension of its own, as it is built with OpenMP where there is one. Tensors come as addresses: no torch headers.
// Tokens are the columns: every loop runs along memory, no sum goes across a vector, and threads share the columns.

#include <pybind11/pybind11.h>

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <string>
#include <vector>

namespace py = pybind11;

#if defined(__x86_64__) && defined(__GLIBC__) && !defined(__clang__) && __GNUC__ >= 12
#define FOR_EACH_CPU __attribute__((target_clones("arch=x86-64-v4", "arch=x86-64-v3", "default")))
#else
#define FOR_EACH_CPU
#endif

namespace {

constexpr std::int64_t kColumns = 64;            // threads take multiples of them: no line of memory is two threads'
constexpr std::int64_t kWorthAThread = 1 << 16;  // logits
constexpr std::int64_t kSummedAlone = 32;        // rows, before they join the long sum: it has fewer roundings

float as_float(std::uint32_t bits) {
    float value;
    std::memcpy(&value, &bits, sizeof value);
    return value;
}

std::uint32_t as_bits(float value) {
    std::uint32_t bits;
    std::memcpy(&bits, &value, sizeof bits);
    return bits;
}

struct Bfloat16 {
    std::uint16_t bits;

    operator float() const { return as_float(static_cast<std::uint32_t>(bits) << 16); }
    Bfloat16& operator=(float value) {  // to the nearest, ties to even
        const std::uint32_t wide = as_bits(value);
        bits = static_cast<std::uint16_t>(value == value ? (wide + 0x7FFF + (wide >> 16 & 1)) >> 16 : 0x7FC0);
        return *this;
    }
};

// e^x of x <= 88 to 2 units in the last place (the polynomial of Cephes' expf), 0 below e^-87. NaN stays NaN.
float exponential(float x) {
    const float shifted = x * 1.44269504f + 12582912.0f;  // 1.5 * 2^23: its lowest bits are the nearest whole number
    const float whole = shifted - 12582912.0f;
    const float r = x - whole * 0.693359375f + whole * 2.12194440e-4f;
    float p = 1.9875691500e-4f;
    p = p * r + 1.3981999507e-3f;
    p = p * r + 8.3334519073e-3f;
    p = p * r + 4.1665795894e-2f;
    p = p * r + 1.6666665459e-1f;
    p = p * r + 5.0000001201e-1f;
    p = p * r * r + r + 1.0f;
    const float power = as_float((as_bits(shifted) << 23) + 0x3F800000);
    return x < -87.0f ? 0.0f : p * power;
}

// Of each column: the largest logit so far, and the sum of exp(logit - largest), carried from slice to slice.
template <typename T>
FOR_EACH_CPU void add_to_statistics(const T* __restrict__ logits, std::int64_t rows, std::int64_t columns, std::int64_t stride,
                                    float* __restrict__ top, float* __restrict__ total, float* __restrict__ work) {
    std::copy_n(top, columns, work);
    for (std::int64_t row = 0; row < rows; ++row) {
        for (std::int64_t i = 0; i < columns; ++i) {
            const float logit = logits[row * stride + i];
            work[i] = logit > work[i] ? logit : work[i];
        }
    }
    for (std::int64_t i = 0; i < columns; ++i) {
        total[i] *= exponential(top[i] - work[i]);
        top[i] = work[i];
    }
    for (std::int64_t low = 0; low < rows; low += kSummedAlone) {
        std::fill_n(work, columns, 0.0f);
        for (std::int64_t row = low; row < std::min(low + kSummedAlone, rows); ++row) {
            for (std::int64_t i = 0; i < columns; ++i) work[i] += exponential(logits[row * stride + i] - top[i]);
        }
        for (std::int64_t i = 0; i < columns; ++i) total[i] += work[i];
    }
}

// slope * exp(logit - lse) - hit * [this row is the label's]
template <typename T>
FOR_EACH_CPU void write_gradient(const T* __restrict__ logits, T* __restrict__ out, std::int64_t rows, std::int64_t columns,
                                 std::int64_t stride, const std::int64_t* __restrict__ labels, const float* __restrict__ lse,
                                 const float* __restrict__ slope, const float* __restrict__ hit) {
    for (std::int64_t row = 0; row < rows; ++row) {
        for (std::int64_t i = 0; i < columns; ++i) {
            const std::int64_t at = row * stride + i;
            out[at] = exponential(logits[at] - lse[i]) * slope[i];
        }
    }
    for (std::int64_t i = 0; i < columns; ++i) {
        if (labels[i] < 0 || labels[i] >= rows) continue;
        const std::int64_t at = labels[i] * stride + i;
        out[at] = exponential(logits[at] - lse[i]) * slope[i] - hit[i];
    }
}

// In OpenMP's threads, which torch's GEMMs use too: threads of our own would share their cores with these, which spin.
template <typename Work>
void share_columns(std::int64_t rows, std::int64_t columns, std::int64_t threads, Work work) {
    const std::int64_t lines = (columns + kColumns - 1) / kColumns;
    threads = std::clamp<std::int64_t>(rows * columns / kWorthAThread, 1, std::max<std::int64_t>(1, std::min(threads, lines)));
    const std::int64_t each = (lines + threads - 1) / threads * kColumns;
#ifdef _OPENMP
#pragma omp parallel for num_threads(threads)
#endif
    for (std::int64_t low = 0; low < columns; low += each) work(low, std::min(each, columns - low));
}

template <typename T>
T* at(std::uintptr_t address) {
    return reinterpret_cast<T*>(address);
}

template <typename T>
void softmax_statistics(std::uintptr_t logits, std::int64_t rows, std::int64_t columns, std::uintptr_t top, std::uintptr_t total,
                        std::int64_t threads) {
    py::gil_scoped_release unlocked;
    share_columns(rows, columns, threads, [=](std::int64_t low, std::int64_t count) {
        std::vector<float> work(count);
        add_to_statistics<T>(at<T>(logits) + low, rows, count, columns, at<float>(top) + low, at<float>(total) + low, work.data());
    });
}

template <typename T>
void softmax_gradient(std::uintptr_t logits, std::uintptr_t out, std::int64_t rows, std::int64_t columns, std::uintptr_t labels,
                      std::uintptr_t lse, std::uintptr_t slope, std::uintptr_t hit, std::int64_t threads) {
    py::gil_scoped_release unlocked;
    share_columns(rows, columns, threads, [=](std::int64_t low, std::int64_t count) {
        write_gradient<T>(at<T>(logits) + low, at<T>(out) + low, rows, count, columns, at<std::int64_t>(labels) + low,
                          at<float>(lse) + low, at<float>(slope) + low, at<float>(hit) + low);
    });
}

template <typename T>
void add_passes(py::module_& module, const std::string& dtype) {
    module.def(("softmax_statistics_" + dtype).c_str(), &softmax_statistics<T>, py::arg("logits"), py::arg("rows"), py::arg("columns"),
               py::arg("top"), py::arg("total"), py::arg("threads"),
               "Addresses: logits [rows, columns] in; fp32 top [columns], total [columns] carried from slice to slice.");
    module.def(("softmax_gradient_" + dtype).c_str(), &softmax_gradient<T>, py::arg("logits"), py::arg("out"), py::arg("rows"),
               py::arg("columns"), py::arg("labels"), py::arg("lse"), py::arg("slope"), py::arg("hit"), py::arg("threads"),
               "Addresses: logits [rows, columns], int64 labels and fp32 lse, slope, hit [columns] in; out [rows, columns].");
}

}  // namespace

PYBIND11_MODULE(_softmax, module) {
    add_passes<Bfloat16>(module, "bfloat16");
    add_passes<float>(module, "float32");
}
