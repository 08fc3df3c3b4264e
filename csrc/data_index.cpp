// Packing and order of documents, as in unimega/data/packing.py and unimega/data/order.py: equal output, tested.
//
// Optional: setup.py builds it where a compiler is found; the Python twins define the results. Arguments are
// checked before any work, and the interpreter lock is released while it is done.

#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>

#include <algorithm>
#include <cstdint>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

namespace py = pybind11;

namespace {

using Lengths = py::array_t<std::int64_t, py::array::c_style | py::array::forcecast>;

// A numpy array that owns the vector's memory.
py::array_t<std::int64_t> to_numpy(std::vector<std::int64_t>&& values) {
    auto* owned = new std::vector<std::int64_t>(std::move(values));
    py::capsule owner(owned, [](void* pointer) { delete static_cast<std::vector<std::int64_t>*>(pointer); });
    return py::array_t<std::int64_t>(static_cast<py::ssize_t>(owned->size()), owned->data(), owner);
}

struct Packs {
    std::vector<std::int64_t> starts{0};
    std::vector<std::int64_t> items;

    void close(std::vector<std::int64_t>& pack) {
        items.insert(items.end(), pack.begin(), pack.end());
        starts.push_back(static_cast<std::int64_t>(items.size()));
        pack.clear();
    }
};

struct OpenPack {
    std::int64_t room;
    std::int32_t slot;  // which of the reused vectors holds its items
};

Packs pack_all(const std::int64_t* lengths, std::int64_t count, std::int64_t pack_length, std::int32_t open_packs) {
    Packs done;
    done.items.reserve(static_cast<std::size_t>(count));
    std::vector<std::vector<std::int64_t>> slots;
    std::vector<std::int32_t> spare;
    std::vector<OpenPack> open;  // ascending room; of equal ones the pack that got there last comes first
    const auto has_less = [](const OpenPack& pack, std::int64_t room) { return pack.room < room; };
    for (std::int64_t item = 0; item < count; ++item) {
        auto place = std::lower_bound(open.begin(), open.end(), lengths[item], has_less);
        OpenPack pack{};
        if (place == open.end()) {
            if (static_cast<std::int32_t>(open.size()) == open_packs) {
                done.close(slots[static_cast<std::size_t>(open.front().slot)]);
                spare.push_back(open.front().slot);
                open.erase(open.begin());
            }
            if (spare.empty()) {
                spare.push_back(static_cast<std::int32_t>(slots.size()));
                slots.emplace_back();
            }
            pack = {pack_length, spare.back()};
            spare.pop_back();
        } else {
            pack = *place;
            open.erase(place);
        }
        auto& items = slots[static_cast<std::size_t>(pack.slot)];
        items.push_back(item);
        pack.room -= lengths[item];
        if (pack.room > 0) {
            open.insert(std::lower_bound(open.begin(), open.end(), pack.room, has_less), pack);
        } else {
            done.close(items);
            spare.push_back(pack.slot);
        }
    }
    for (const auto& pack : open) done.close(slots[static_cast<std::size_t>(pack.slot)]);
    return done;
}

py::tuple best_fit(const Lengths& lengths, std::int64_t pack_length, std::int32_t open_packs) {
    if (lengths.ndim() != 1) throw std::invalid_argument("lengths has " + std::to_string(lengths.ndim()) + " dims, not 1");
    if (pack_length < 1) throw std::invalid_argument("pack_length=" + std::to_string(pack_length) + " is not positive");
    if (open_packs < 1) throw std::invalid_argument("open_packs=" + std::to_string(open_packs) + " is not positive");
    const std::int64_t* data = lengths.data();
    const std::int64_t count = lengths.size();
    Packs packs;
    {
        py::gil_scoped_release unlocked;
        for (std::int64_t item = 0; item < count; ++item) {
            if (data[item] < 1 || data[item] > pack_length) {
                throw std::invalid_argument("item " + std::to_string(item) + " has length " + std::to_string(data[item]) +
                                            ", which does not lie in 1.." + std::to_string(pack_length));
            }
        }
        packs = pack_all(data, count, pack_length, open_packs);
    }
    return py::make_tuple(to_numpy(std::move(packs.starts)), to_numpy(std::move(packs.items)));
}

std::uint64_t mix(std::uint64_t word) {
    word ^= word >> 33;
    word *= 0xff51afd7ed558ccdULL;
    word ^= word >> 33;
    word *= 0xc4ceb9fe1a85ec53ULL;
    return word ^ (word >> 33);
}

constexpr std::uint64_t kGolden = 0x9E3779B97F4A7C15ULL;

std::uint64_t draw(std::uint64_t first, std::uint64_t second) {
    const std::uint64_t state = mix(first + kGolden);
    return mix((state ^ second) + kGolden);
}

constexpr std::uint64_t kSortedBelow = 4096;
constexpr int kRounds = 8;

std::vector<std::int64_t> permuted(std::uint64_t size, std::uint64_t key, std::uint64_t start, std::uint64_t count) {
    std::vector<std::int64_t> out(count);
    if (size <= kSortedBelow) {
        std::vector<std::pair<std::uint64_t, std::int64_t>> hashed(size);
        for (std::uint64_t i = 0; i < size; ++i) hashed[i] = {draw(key, i), static_cast<std::int64_t>(i)};
        std::sort(hashed.begin(), hashed.end());  // ties by place: the same as a stable sort by hash
        for (std::uint64_t i = 0; i < count; ++i) out[i] = hashed[start + i].second;
        return out;
    }
    int bits = 0;
    while (((size - 1) >> bits) != 0) ++bits;
    const int half = (bits + 1) / 2;
    const std::uint64_t low = (std::uint64_t{1} << half) - 1;
    std::uint64_t keys[kRounds];
    for (int round = 0; round < kRounds; ++round) keys[round] = draw(key, static_cast<std::uint64_t>(round));
    for (std::uint64_t i = 0; i < count; ++i) {
        std::uint64_t value = start + i;
        do {  // cycle walking: at most four turns on average
            std::uint64_t left = value >> half;
            std::uint64_t right = value & low;
            for (const std::uint64_t round_key : keys) {
                const std::uint64_t next = (left ^ mix(right ^ round_key)) & low;
                left = right;
                right = next;
            }
            value = (left << half) | right;
        } while (value >= size);
        out[i] = static_cast<std::int64_t>(value);
    }
    return out;
}

py::array_t<std::int64_t> permute(std::int64_t size, std::uint64_t key, std::int64_t start, std::int64_t count) {
    if (size < 0 || size > (std::int64_t{1} << 62)) throw std::invalid_argument("size=" + std::to_string(size) + " does not lie in 0..2^62");
    if (start < 0 || count < 0 || start > size || count > size - start) {
        throw std::invalid_argument("places " + std::to_string(start) + " + " + std::to_string(count) + " do not lie in a permutation of " +
                                    std::to_string(size));
    }
    std::vector<std::int64_t> out;
    {
        py::gil_scoped_release unlocked;
        out = permuted(static_cast<std::uint64_t>(size), key, static_cast<std::uint64_t>(start), static_cast<std::uint64_t>(count));
    }
    return to_numpy(std::move(out));
}

}  // namespace

PYBIND11_MODULE(_data_index, module) {
    module.doc() = "C++ twins of unimega.data.packing.best_fit and unimega.data.order.permute.";
    module.def("best_fit", &best_fit, py::arg("lengths"), py::arg("pack_length"), py::kw_only(), py::arg("open_packs"),
               "Online best fit: (starts i64[packs + 1], items i64[items]).");
    module.def("permute", &permute, py::arg("size"), py::arg("key"), py::arg("start"), py::arg("count"),
               "Places start .. start + count of the permutation of range(size) that belongs to key: i64[count].");
}
