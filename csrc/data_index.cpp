// Packing, order and filling of documents, as in unimega/data/{packing,order,rows}.py: equal output, tested.
//
// Optional: setup.py builds it where a compiler is found; the Python twins define the results. Arguments are
// checked before any work, and the interpreter lock is released while it is done.

#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <numeric>
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

// ---- filling: pieces (unimega/data/pieces.py) to the arrays of a micro-batch (unimega/data/rows.py) ----

enum : std::uint8_t { kVision = 1, kWanted = 2, kLiteral = 4, kPad = 8 };

template <typename T>
using Array = py::array_t<T, py::array::c_style>;

// The integers of a corpus, in whatever type the file has.
struct Elements {
    const char* data;
    std::int64_t count;
    char kind;
    std::int64_t bytes;

    template <typename T>
    void read(std::int64_t first, std::int64_t number, std::int32_t* out) const {
        const char* from = data + first * static_cast<std::int64_t>(sizeof(T));
        if (sizeof(T) == sizeof(std::int32_t)) {
            std::memcpy(out, from, static_cast<std::size_t>(number) * sizeof(T));
            return;
        }
        for (std::int64_t i = 0; i < number; ++i) {
            T value;
            std::memcpy(&value, from + i * static_cast<std::int64_t>(sizeof(T)), sizeof(T));
            const bool fits = static_cast<std::int64_t>(value) == static_cast<std::int32_t>(value);
            out[i] = fits ? static_cast<std::int32_t>(value) : -1;  // no id is below 0: found by the check behind
        }
    }

    void copy(std::int64_t first, std::int64_t number, std::int32_t* out) const {
        if (first < 0 || number < 0 || first > count || number > count - first) {
            throw std::invalid_argument("elements " + std::to_string(first) + " + " + std::to_string(number) + " of " + std::to_string(count));
        }
        const bool is_signed = kind == 'i';
        if (bytes == 4 && is_signed) read<std::int32_t>(first, number, out);
        else if (bytes == 2) is_signed ? read<std::int16_t>(first, number, out) : read<std::uint16_t>(first, number, out);
        else if (bytes == 1) is_signed ? read<std::int8_t>(first, number, out) : read<std::uint8_t>(first, number, out);
        else read<std::int64_t>(first, number, out);
    }
};

struct Pieces {
    const std::int64_t* starts;
    std::int64_t documents;
    const std::int64_t* address;
    const std::int64_t* length;
    const std::uint8_t* flags;
    const std::int16_t* corpus;
    const std::int64_t* pack_starts;
    std::int64_t packs;
    std::int64_t pack_length;
};

struct Ids {
    std::vector<Elements> elements;
    const std::int32_t* literals;
    std::int64_t literal_count;
    std::vector<std::int32_t> vision_ids;
    std::int32_t text_limit, offset, codebook, pad;
    std::int64_t row_separator;
    std::int32_t separator;
};

struct Rows {
    std::int32_t *tokens, *labels, *permutation, *inverse, *to_documents, *from_documents, *positions, *document;
    float* weights;
    std::vector<std::int64_t> group_sizes, own_sizes;
    std::vector<std::int32_t> loss_rows;
    std::int64_t totals[3] = {0, 0, 0};  // tokens of text, of pads, of vision
    std::int64_t text_loss_rows = 0;
};

// Runs of these sizes as unimega.batch.Intervals has them: borders, first key of each row, sizes, the longest.
py::tuple runs(const std::vector<std::int64_t>& sizes, py::ssize_t total) {
    py::array_t<std::int32_t> borders(static_cast<py::ssize_t>(sizes.size()) + 1), first(total);
    py::tuple lengths(sizes.size());
    std::int32_t* border = borders.mutable_data();
    std::int32_t* low = first.mutable_data();
    std::int64_t longest = 0;
    border[0] = 0;
    for (std::size_t i = 0; i < sizes.size(); ++i) {
        border[i + 1] = border[i] + static_cast<std::int32_t>(sizes[i]);
        std::fill(low + border[i], low + border[i + 1], border[i]);
        lengths[i] = py::int_(sizes[i]);
        longest = std::max(longest, sizes[i]);
    }
    return py::make_tuple(borders, first, lengths, longest);
}

// The tokens of one piece; false: an id is not of its modality.
bool fill(const Pieces& pieces, std::int64_t at, const Ids& ids, std::int32_t* out) {
    const std::int64_t length = pieces.length[at], address = pieces.address[at];
    const std::uint8_t flags = pieces.flags[at];
    if (flags & kPad) {
        std::fill(out, out + length, ids.pad);
        return true;
    }
    if (flags & kLiteral) {
        if (address < 0 || address > ids.literal_count || length > ids.literal_count - address) throw std::invalid_argument("literal out of range");
        std::memcpy(out, ids.literals + address, static_cast<std::size_t>(length) * sizeof(std::int32_t));
    } else {
        const Elements& elements = ids.elements.at(static_cast<std::size_t>(pieces.corpus[at]));
        if (flags & kVision) {
            const std::int64_t row = ids.row_separator;
            const std::int64_t codes = row ? length - length / (row + 1) : length;
            elements.copy(address, codes, out);
            bool sound = true;
            for (std::int64_t i = 0; i < codes; ++i) {
                sound &= static_cast<std::uint32_t>(out[i]) < static_cast<std::uint32_t>(ids.codebook);
                out[i] += ids.offset;
            }
            if (row) {  // spread from the back
                for (std::int64_t i = length - 1; i >= 0; --i) out[i] = i % (row + 1) == row ? ids.separator : out[i - i / (row + 1)];
            }
            return sound;
        }
        elements.copy(address, length, out);
    }
    if (flags & kVision) return true;
    bool sound = true;
    for (std::int64_t i = 0; i < length; ++i) sound &= static_cast<std::uint32_t>(out[i]) < static_cast<std::uint32_t>(ids.text_limit);
    for (const std::int32_t id : ids.vision_ids) {
        for (std::int64_t i = 0; i < length; ++i) sound &= out[i] != id;
    }
    return sound;
}

void ramp(std::int32_t* out, std::int64_t count, std::int64_t first) {
    for (std::int64_t i = 0; i < count; ++i) out[i] = static_cast<std::int32_t>(first + i);
}

bool make_rows(const Pieces& pieces, const Ids& ids, const float* scale, bool cross_document, Rows& rows) {
    enum { kTextRow, kPadRow, kVisionRow };
    const std::int64_t count = pieces.starts[pieces.documents];
    std::int64_t* totals = rows.totals;
    const auto kind_of = [&](std::int64_t at) { return pieces.flags[at] & kPad ? kPadRow : pieces.flags[at] & kVision ? kVisionRow : kTextRow; };
    for (std::int64_t at = 0; at < count; ++at) totals[kind_of(at)] += pieces.length[at];
    const std::int64_t total = totals[0] + totals[1] + totals[2], real = total - totals[kPadRow];
    std::int64_t next[3] = {0, totals[kTextRow], totals[kTextRow] + totals[kPadRow]};  // in modality order
    std::int64_t place_in_documents = 0, pad_in_documents = real, start = 0, groups = 0;
    std::vector<std::int64_t> places(static_cast<std::size_t>(count)), own[3], pad_sizes;
    std::vector<std::int64_t> last_group(3, -1);
    std::vector<std::int32_t> group_of(static_cast<std::size_t>(pieces.documents));
    // groups: documents (or packs) in order, then the pads of each pack
    for (std::int64_t pack = 0, last = -1; pack < pieces.packs; ++pack) {
        for (std::int64_t document = pieces.pack_starts[pack]; document < pieces.pack_starts[pack + 1]; ++document) {
            if (pieces.flags[pieces.starts[document]] & kPad) continue;
            if (!cross_document || last != pack) ++groups;
            last = pack;
            group_of[static_cast<std::size_t>(document)] = static_cast<std::int32_t>(groups - 1);
        }
    }
    rows.group_sizes.assign(static_cast<std::size_t>(groups), 0);
    bool sound = true;
    for (std::int64_t document = 0; document < pieces.documents; ++document) {
        const std::int64_t begin = start;
        for (std::int64_t at = pieces.starts[document]; at < pieces.starts[document + 1]; ++at) {
            const std::int64_t length = pieces.length[at];
            const int kind = kind_of(at);
            if (kind == kPadRow && at == pieces.starts[document]) {
                group_of[static_cast<std::size_t>(document)] = static_cast<std::int32_t>(rows.group_sizes.size());
                rows.group_sizes.push_back(0);
            }
            const std::int64_t group = group_of[static_cast<std::size_t>(document)];
            const std::int64_t place = places[static_cast<std::size_t>(at)] = next[kind];
            next[kind] += length;
            std::int64_t& document_order = kind == kPadRow ? pad_in_documents : place_in_documents;
            sound &= fill(pieces, at, ids, rows.tokens + place);
            ramp(rows.permutation + place, length, start);
            ramp(rows.inverse + start, length, place);
            ramp(rows.to_documents + document_order, length, place);
            ramp(rows.from_documents + place, length, document_order);
            ramp(rows.positions + place, length, start - (cross_document ? start / pieces.pack_length * pieces.pack_length : begin));
            std::fill(rows.document + place, rows.document + place + length, static_cast<std::int32_t>(group));
            const float weight = pieces.flags[at] & kWanted ? scale[kind == kVisionRow] : 0.0F;
            std::fill(rows.weights + place, rows.weights + place + length, weight);
            if (last_group[static_cast<std::size_t>(kind)] != group) own[kind].push_back(0);
            last_group[static_cast<std::size_t>(kind)] = group;
            own[kind].back() += length;
            rows.group_sizes[static_cast<std::size_t>(group)] += length;
            document_order += length;
            start += length;
        }
    }
    std::memcpy(rows.labels, rows.tokens + 1, static_cast<std::size_t>(total - 1) * sizeof(std::int32_t));
    for (std::int64_t document = 0; document < pieces.documents; ++document) {
        for (std::int64_t at = pieces.starts[document]; at < pieces.starts[document + 1]; ++at) {
            const std::int64_t end = places[static_cast<std::size_t>(at)] + pieces.length[at] - 1;
            const bool follows = at + 1 < pieces.starts[document + 1];
            rows.labels[end] = follows ? rows.tokens[places[static_cast<std::size_t>(at) + 1]] : ids.pad;
            rows.weights[end] = follows && pieces.flags[at + 1] & kWanted ? scale[kind_of(at) == kVisionRow] : 0.0F;
        }
    }
    for (const auto& sizes : own) rows.own_sizes.insert(rows.own_sizes.end(), sizes.begin(), sizes.end());
    rows.loss_rows.resize(static_cast<std::size_t>(total));
    std::size_t found = 0;
    for (std::int64_t i = 0; i < total; ++i) {
        rows.loss_rows[found] = static_cast<std::int32_t>(i);
        found += rows.weights[i] != 0.0F;
    }
    rows.loss_rows.resize(found);
    const auto vision = static_cast<std::int32_t>(total - totals[kVisionRow]);
    rows.text_loss_rows = std::lower_bound(rows.loss_rows.begin(), rows.loss_rows.end(), vision) - rows.loss_rows.begin();
    return sound;
}

Pieces checked(const Array<std::int64_t>& starts, const Array<std::int64_t>& address, const Array<std::int64_t>& length,
               const Array<std::uint8_t>& flags, const Array<std::int16_t>& corpus, const Array<std::int64_t>& pack_starts,
               std::int64_t pack_length) {
    const Pieces pieces{starts.data(), starts.size() - 1, address.data(), length.data(), flags.data(), corpus.data(),
                        pack_starts.data(), pack_starts.size() - 1, pack_length};
    const auto rising = [](const Array<std::int64_t>& borders, std::int64_t last) {
        const std::int64_t* data = borders.data();
        if (borders.size() < 2 || data[0] != 0 || data[borders.size() - 1] != last) return false;
        return std::adjacent_find(data, data + borders.size(), [](std::int64_t a, std::int64_t b) { return a >= b; }) == data + borders.size();
    };
    const std::int64_t count = address.size();
    if (length.size() != count || flags.size() != count || corpus.size() != count || !rising(starts, count) ||
        !rising(pack_starts, pieces.documents) || pack_length < 1) {
        throw std::invalid_argument("the arrays of the pieces do not belong together");
    }
    if (std::any_of(pieces.length, pieces.length + count, [](std::int64_t size) { return size < 1; }) ||
        std::accumulate(pieces.length, pieces.length + count, std::int64_t{0}) != pieces.packs * pack_length) {
        throw std::invalid_argument("the pieces do not fill " + std::to_string(pieces.packs) + " packs of " + std::to_string(pack_length));
    }
    return pieces;
}

py::object collate(const py::list& elements, const Array<std::int32_t>& literals, const Array<std::int64_t>& starts,
                   const Array<std::int64_t>& address, const Array<std::int64_t>& length, const Array<std::uint8_t>& flags,
                   const Array<std::int16_t>& corpus, const Array<std::int64_t>& pack_starts, std::int64_t pack_length,
                   const Array<float>& scale, const Array<std::int32_t>& vision_ids, std::int32_t text_limit, std::int32_t offset,
                   std::int32_t codebook, std::int32_t pad, std::int64_t row_separator, std::int32_t separator, bool cross_document) {
    const Pieces pieces = checked(starts, address, length, flags, corpus, pack_starts, pack_length);
    if (scale.size() < 1 || row_separator < 0) throw std::invalid_argument("scale is empty, or row_separator negative");
    const float scales[2] = {scale.data()[0], scale.data()[scale.size() > 1 ? 1 : 0]};
    Ids ids{{}, literals.data(), literals.size(), {vision_ids.data(), vision_ids.data() + vision_ids.size()}, text_limit, offset, codebook, pad, row_separator, separator};
    for (const auto& item : elements) {
        const auto array = py::cast<py::array>(item);
        ids.elements.push_back({static_cast<const char*>(array.data()), array.size(), array.dtype().kind(), array.itemsize()});
    }
    const py::ssize_t total = static_cast<py::ssize_t>(pieces.packs * pack_length);
    std::vector<py::array_t<std::int32_t>> made;
    for (int i = 0; i < 8; ++i) made.emplace_back(total);
    py::array_t<float> weights(total);
    Rows rows{made[0].mutable_data(), made[1].mutable_data(), made[2].mutable_data(), made[3].mutable_data(), made[4].mutable_data(),
              made[5].mutable_data(), made[6].mutable_data(), made[7].mutable_data(), weights.mutable_data(), {}, {}, {}, {0, 0, 0}, 0};
    bool sound = false;
    {
        py::gil_scoped_release unlocked;
        sound = make_rows(pieces, ids, scales, cross_document, rows);
    }
    if (!sound) return py::none();
    auto* found = new std::vector<std::int32_t>(std::move(rows.loss_rows));
    py::capsule owner(found, [](void* pointer) { delete static_cast<std::vector<std::int32_t>*>(pointer); });
    py::array_t<std::int32_t> loss_rows(static_cast<py::ssize_t>(found->size()), found->data(), owner);
    return py::make_tuple(made[0], made[1], weights, loss_rows, made[2], made[3], made[4], made[5], made[6], made[7],
                          runs(rows.group_sizes, total), runs(rows.own_sizes, total), rows.totals[0], rows.totals[1],
                          rows.text_loss_rows);
}

}  // namespace

void add_routing(py::module_& module);  // routing.cpp

PYBIND11_MODULE(_data_index, module) {
    module.doc() = "C++ twins of unimega.data.packing.best_fit, unimega.data.order.permute and unimega.data.rows.rows.";
    module.attr("version") = 3;  // unimega/data/native.py takes no other
    module.def("best_fit", &best_fit, py::arg("lengths"), py::arg("pack_length"), py::kw_only(), py::arg("open_packs"),
               "Online best fit: (starts i64[packs + 1], items i64[items]).");
    module.def("permute", &permute, py::arg("size"), py::arg("key"), py::arg("start"), py::arg("count"),
               "Places start .. start + count of the permutation of range(size) that belongs to key: i64[count].");
    module.def("collate", &collate, py::kw_only(), py::arg("elements"), py::arg("literals"), py::arg("starts"), py::arg("address"),
               py::arg("length"), py::arg("flags"), py::arg("corpus"), py::arg("pack_starts"), py::arg("pack_length"), py::arg("scale"),
               py::arg("vision_ids"), py::arg("text_limit"), py::arg("offset"), py::arg("codebook"), py::arg("pad"),
               py::arg("row_separator"), py::arg("separator"), py::arg("cross_document"),
               "The arrays of a micro-batch, in the order of unimega.data.rows.Rows; None: an id is not of its modality.");
    add_routing(module);
}
