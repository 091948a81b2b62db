// The only file that knows Python. Kernels are exposed as functions of plain integers (addresses,
// sizes): one build serves every version of torch, and a call allocates nothing.
#include <pybind11/pybind11.h>

#include <cstdint>
#include <cstring>
#include <optional>
#include <stdexcept>
#include <string>
#include <type_traits>
#include <utility>
#include <vector>

#include "calibrated_scores/kernel.h"
#include "common/dlpack.h"
#include "common/isa.h"
#include "common/status.h"
#include "common/tensor_view.h"
#include "common/threads.h"
#include "health_scan/kernel.h"
#include "power_iteration/kernel.h"
#include "rolling_zscore/kernel.h"
#include "soft_assign/kernel.h"

namespace py = pybind11;

namespace foreshock {
namespace {

// Addresses arrive as integers, so that any owner of memory can be named.
template <class T>
using Plain = std::conditional_t<std::is_pointer_v<T>, std::uintptr_t, T>;

template <class T>
T from_plain(Plain<T> value) {
    if constexpr (std::is_pointer_v<T>) {
        return reinterpret_cast<T>(value);
    } else {
        return value;
    }
}

Dtype dtype_of(const dlpack::Tensor& tensor) {
    if (tensor.type_lanes == 1) {
        switch (tensor.type_code) {
            case dlpack::kFloat:
                if (tensor.type_bits == 64) return Dtype::float64;
                if (tensor.type_bits == 32) return Dtype::float32;
                if (tensor.type_bits == 16) return Dtype::float16;
                break;
            case dlpack::kBfloat:
                return Dtype::bfloat16;
            case dlpack::kFloat8E4M3fn:
                return Dtype::float8_e4m3fn;
            case dlpack::kFloat8E5M2:
                return Dtype::float8_e5m2;
            default:
                break;
        }
    }
    throw py::type_error("a tensor of an element type that no kernel reads");
}

// Byte offsets into torch's own objects; see src/foreshock/ops/_tensor_layout.py, which finds them.
struct TensorLayout {
    static constexpr std::size_t kInlineDims = 5;  // more are not kept inside the object

    std::size_t object_impl, impl_storage, impl_storage_offset, impl_numel, impl_sizes,
        impl_strides, impl_dtype, storage_data;

    explicit TensorLayout(const py::sequence& offsets)
        : object_impl(offsets[0].cast<std::size_t>()),
          impl_storage(offsets[1].cast<std::size_t>()),
          impl_storage_offset(offsets[2].cast<std::size_t>()),
          impl_numel(offsets[3].cast<std::size_t>()),
          impl_sizes(offsets[4].cast<std::size_t>()),
          impl_strides(offsets[5].cast<std::size_t>()),
          impl_dtype(offsets[6].cast<std::size_t>()),
          storage_data(offsets[7].cast<std::size_t>()) {}

    template <class T>
    static T at(const void* base, std::size_t offset) {
        T value;
        std::memcpy(&value, static_cast<const char*>(base) + offset, sizeof value);
        return value;
    }
};

// What stood in one place of a list. Equal footprints mean equal memory, type, shape and strides.
struct Footprint {
    std::int64_t storage_offset = 0;
    std::int64_t numel = 0;
    const void* storage_data = nullptr;
    std::uint16_t dtype = 0;

    bool operator==(const Footprint& other) const {
        return storage_data == other.storage_data && numel == other.numel &&
               storage_offset == other.storage_offset && dtype == other.dtype;
    }
};

// Where a list of tensors lies in memory, and whether another list lies in the same places. The
// tensors are described through torch's DLPack exchange functions; to compare, where the layout of
// torch's objects is known, their words are looked at directly, which is several times faster. The
// owner of the table keeps the tensors alive.
class TensorTable {
  public:
    TensorTable(const py::list& tensors, const py::capsule& exchange_api, const py::object& layout)
        : read_(reader(exchange_api)) {
        if (!layout.is_none()) layout_.emplace(py::cast<py::sequence>(layout));
        const std::size_t count = tensors.size();
        entries_.resize(count);
        std::size_t dims = 0;
        for (std::size_t i = 0; i < count; ++i) {
            describe(PyList_GET_ITEM(tensors.ptr(), static_cast<Py_ssize_t>(i)), entries_[i]);
            dims += entries_[i].shape_and_strides.size();
        }
        coalesced_.resize(dims);
        views_.reserve(count);
        std::int64_t* room = coalesced_.data();
        for (const Entry& entry : entries_) {
            const auto ndim = static_cast<std::int32_t>(entry.ndim());
            const std::int64_t* shape = entry.shape_and_strides.data();
            std::int64_t numel = entry.type == nullptr ? 0 : 1;
            for (std::int32_t d = 0; d < ndim; ++d) numel *= shape[d];
            std::int64_t* strides = room + ndim;
            const auto kept = coalesce(ndim, shape, shape + ndim, room, strides);
            views_.push_back({entry.data, numel, room, strides, kept, entry.dtype});
            room += 2 * ndim;
        }
    }

    // Whether these are tensors at the same addresses, with the same types, shapes and strides.
    bool matches(const py::list& tensors) const {
        if (tensors.size() != entries_.size()) return false;
        for (std::size_t i = 0; i < entries_.size(); ++i) {
            const Entry& entry = entries_[i];
            PyObject* object = PyList_GET_ITEM(tensors.ptr(), static_cast<Py_ssize_t>(i));
            if (entry.type == nullptr) {
                if (object != Py_None) return false;
            } else if (Py_TYPE(object) != entry.type) {
                return false;
            } else if (layout_ && entry.ndim() <= TensorLayout::kInlineDims) {
                if (!looks_like(entry, object)) return false;
            } else if (!reads_like(entry, object)) {
                return false;
            }
        }
        return true;
    }

    // Whether nothing but addresses differs, as when gradients are made anew at every step: from
    // now on the table says where these tensors lie. False leaves a table that is to be made anew.
    bool follow(const py::list& tensors) {
        if (tensors.size() != entries_.size()) return false;
        try {
            return take_addresses(tensors);
        } catch (const py::builtin_exception&) {  // an element type that no kernel reads
            return false;
        } catch (const py::error_already_set&) {  // no memory that could be read
            return false;
        }
    }

    std::uintptr_t address() const { return reinterpret_cast<std::uintptr_t>(views_.data()); }
    std::size_t size() const { return views_.size(); }

  private:
    friend class VectorReader;
    friend class RowsReader;
    using Reader = int (*)(void*, dlpack::Tensor*);

    bool take_addresses(const py::list& tensors) {
        for (std::size_t i = 0; i < entries_.size(); ++i) {
            PyObject* object = PyList_GET_ITEM(tensors.ptr(), static_cast<Py_ssize_t>(i));
            Entry& entry = entries_[i];
            if (object == Py_None || Py_TYPE(object) != entry.type) {
                if (object != Py_None || entry.type != nullptr) return false;
                continue;
            }
            Entry now;
            describe(object, now);
            if (!is_shaped_like(now, entry)) return false;
            views_[i].data = now.data;
            entry = std::move(now);
        }
        return true;
    }

    struct Entry {
        PyTypeObject* type = nullptr;  // null: None stood here
        const void* data = nullptr;
        std::int32_t device_type = 0;
        std::int32_t device_id = 0;
        Dtype dtype = Dtype::float32;
        std::vector<std::int64_t> shape_and_strides;
        Footprint footprint;

        std::size_t ndim() const { return shape_and_strides.size() / 2; }
    };

    static const void* data_of(const dlpack::Tensor& tensor) {
        return static_cast<const char*>(tensor.data) + tensor.byte_offset;
    }

    static Reader reader(const py::capsule& capsule) {
        const auto* api = static_cast<const dlpack::ExchangeApi*>(
            PyCapsule_GetPointer(capsule.ptr(), dlpack::kCapsuleName));
        if (api == nullptr) throw py::error_already_set();
        while (api != nullptr && api->major != dlpack::kMajor) api = api->previous;
        if (api == nullptr) throw py::value_error("exchange_api: no DLPack version 1 in it");
        return api->tensor_from_py_object;
    }

    // Null where the object has no storage of its own, as a sparse tensor has not.
    const char* find_impl(PyObject* object, Footprint& footprint) const {
        const auto* impl = TensorLayout::at<const char*>(object, layout_->object_impl);
        if (impl == nullptr) return nullptr;
        const void* storage = TensorLayout::at<const void*>(impl, layout_->impl_storage);
        if (storage == nullptr) return nullptr;
        footprint.storage_offset =
            TensorLayout::at<std::int64_t>(impl, layout_->impl_storage_offset);
        footprint.numel = TensorLayout::at<std::int64_t>(impl, layout_->impl_numel);
        footprint.storage_data = TensorLayout::at<const void*>(storage, layout_->storage_data);
        footprint.dtype = TensorLayout::at<std::uint16_t>(impl, layout_->impl_dtype);
        return impl;
    }

    bool looks_like(const Entry& entry, PyObject* object) const {
        Footprint now;
        const char* impl = find_impl(object, now);
        if (impl == nullptr || !(now == entry.footprint)) return false;
        const std::size_t bytes = entry.ndim() * sizeof(std::int64_t);
        const std::int64_t* sizes = entry.shape_and_strides.data();
        return std::memcmp(impl + layout_->impl_sizes, sizes, bytes) == 0 &&
               std::memcmp(impl + layout_->impl_strides, sizes + entry.ndim(), bytes) == 0;
    }

    bool reads_like(const Entry& entry, PyObject* object) const {
        Entry now;
        describe(object, now);
        return now.data == entry.data && is_shaped_like(now, entry);
    }

    static bool is_shaped_like(const Entry& a, const Entry& b) {
        return a.device_type == b.device_type && a.device_id == b.device_id && a.dtype == b.dtype &&
               a.shape_and_strides == b.shape_and_strides;
    }

    void describe(PyObject* object, Entry& entry) const {
        if (object == Py_None) return;
        dlpack::Tensor tensor;
        if (read_(object, &tensor) != 0) throw py::error_already_set();
        entry.type = Py_TYPE(object);
        entry.data = data_of(tensor);
        entry.device_type = tensor.device_type;
        entry.device_id = tensor.device_id;
        entry.dtype = dtype_of(tensor);
        entry.shape_and_strides.assign(tensor.shape, tensor.shape + tensor.ndim);
        entry.shape_and_strides.insert(entry.shape_and_strides.end(), tensor.strides,
                                       tensor.strides + tensor.ndim);
        if (layout_) find_impl(object, entry.footprint);
    }

    Reader read_;
    std::optional<TensorLayout> layout_;
    std::vector<Entry> entries_;
    std::vector<std::int64_t> coalesced_;
    std::vector<TensorView> views_;
};

// Looks where a vector lies that is another one at each call, for the kernel of some plan.
class VectorReader {
  public:
    VectorReader(const py::capsule& exchange_api, py::type tensor_type, std::int64_t numel,
                 int type_bits, std::uintptr_t plan)
        : read_(TensorTable::reader(exchange_api)),
          tensor_type_(std::move(tensor_type)),
          numel_(numel),
          type_bits_(type_bits),
          plan_(from_plain<const void*>(plan)) {}

    // Null if this is not a vector of `numel` floating-point numbers of so many bits that follow
    // each other in host memory. A lazy negation looks like any other vector, but for its stride:
    // that of the complex numbers it is a part of.
    const void* find(py::handle object) const {
        if (reinterpret_cast<PyObject*>(Py_TYPE(object.ptr())) != tensor_type_.ptr()) {
            return nullptr;
        }
        dlpack::Tensor tensor;
        if (read_(object.ptr(), &tensor) != 0) {
            PyErr_Clear();  // who asks will look more closely, and say what is wrong
            return nullptr;
        }
        const bool is_found = tensor.device_type == dlpack::kCpu &&
                              tensor.type_code == dlpack::kFloat &&
                              tensor.type_bits == type_bits_ && tensor.ndim == 1 &&
                              tensor.shape[0] == numel_ && tensor.strides[0] == 1;
        return is_found ? TensorTable::data_of(tensor) : nullptr;
    }

    const void* plan() const { return plan_; }
    // Whether the work is over before the GIL would be released.
    bool is_short() const { return numel_ < 1024; }

  private:
    TensorTable::Reader read_;
    py::type tensor_type_;
    std::int64_t numel_;
    int type_bits_;
    const void* plan_;
};

// Looks where rows lie that are others at each call, for the kernel of some plan.
class RowsReader {
  public:
    struct Rows {
        const void* data;
        std::int64_t dtype;
        std::int64_t count;
        std::int64_t stride;
    };

    RowsReader(const py::capsule& exchange_api, py::type tensor_type, std::int64_t features,
               std::uintptr_t plan)
        : read_(TensorTable::reader(exchange_api)),
          tensor_type_(std::move(tensor_type)),
          features_(features),
          plan_(from_plain<const void*>(plan)) {}

    // False if this is not (N, D) or (N, P, D) in host memory, of floating-point numbers that
    // follow each other in a row, and of rows that are equally far apart. A lazy negation is none,
    // as in VectorReader.
    bool find(py::handle object, Rows& rows) const {
        if (reinterpret_cast<PyObject*>(Py_TYPE(object.ptr())) != tensor_type_.ptr()) return false;
        dlpack::Tensor tensor;
        if (read_(object.ptr(), &tensor) != 0) {
            PyErr_Clear();  // who asks will look more closely, and say what is wrong
            return false;
        }
        const bool is_float = tensor.type_code == dlpack::kFloat && tensor.type_bits >= 16;
        const std::int32_t last = tensor.ndim - 1;
        if (tensor.device_type != dlpack::kCpu ||
            !(is_float || tensor.type_code == dlpack::kBfloat) || last < 1 || last > 2 ||
            tensor.shape[last] != features_ || tensor.strides[last] != 1) {
            return false;
        }
        rows = {TensorTable::data_of(tensor), static_cast<std::int64_t>(dtype_of(tensor)),
                tensor.shape[0], tensor.strides[0]};
        if (last == 1) return true;
        rows.count *= tensor.shape[1];
        rows.stride = tensor.strides[1];
        return tensor.strides[0] == tensor.shape[1] * tensor.strides[1];
    }

    const void* plan() const { return plan_; }

  private:
    TensorTable::Reader read_;
    py::type tensor_type_;
    std::int64_t features_;
    const void* plan_;
};

// Gives an op's entry points to Python as functions named <op>_<entry point>; the GIL is released
// in them, and a Status that is not done becomes a RuntimeError.
class Registrar {
  public:
    Registrar(py::module_& module, const char* op) : module_(module), prefix_(op) {
        prefix_ += '_';
    }

    template <class Result, class... Args>
    void operator()(const char* name, Result (*function)(Args...)) {
        module_.def((prefix_ + name).c_str(), [function](Plain<Args>... args) {
            Result result;
            {
                py::gil_scoped_release release;
                result = function(from_plain<Args>(args)...);
            }
            if constexpr (std::is_same_v<Result, Status>) {
                if (result != nullptr) throw std::runtime_error(result);
            } else {
                return result;
            }
        });
    }

    // A function that is over before the GIL would be released.
    template <class Result, class... Args>
    void brief(const char* name, Result (*function)(Args...)) {
        module_.def((prefix_ + name).c_str(), [function](Plain<Args>... args) {
            return function(from_plain<Args>(args)...);
        });
    }

    // A function of a plan and a vector becomes one of a VectorReader and any object: false says
    // that this is no vector that can be read in place, and that nothing was done.
    template <class Plan>
    void of_vector(const char* name, void (*function)(const Plan*, const void*)) {
        module_.def((prefix_ + name).c_str(),
                    [function](const VectorReader& reader, py::handle object) {
                        const void* values = reader.find(object);
                        if (values == nullptr) return false;
                        if (reader.is_short()) {
                            function(static_cast<const Plan*>(reader.plan()), values);
                        } else {
                            py::gil_scoped_release release;
                            function(static_cast<const Plan*>(reader.plan()), values);
                        }
                        return true;
                    });
    }

    // A function of a plan and rows becomes one of a RowsReader, any object and how many rows it
    // should have: false says that these are not there to be read in place, and nothing was done.
    template <class Plan, class... Args>
    void of_rows(const char* name, Status (*function)(const Plan*, const void*, std::int64_t,
                                                      std::int64_t, std::int64_t, Args...)) {
        module_.def(
            (prefix_ + name).c_str(), [function](const RowsReader& reader, py::handle object,
                                                 std::int64_t count, Plain<Args>... args) {
                RowsReader::Rows rows;
                if (!reader.find(object, rows) || rows.count != count) return false;
                py::gil_scoped_release release;
                return function(static_cast<const Plan*>(reader.plan()), rows.data, rows.dtype,
                                count, rows.stride, from_plain<Args>(args)...) == nullptr;
            });
    }

  private:
    py::module_& module_;
    std::string prefix_;
};

py::list isas() {
    py::list all;
    for (const Isa& isa : detect_isas()) all.append(py::make_tuple(isa.name, isa.is_supported));
    return all;
}

bool has_cuda() {
#if defined(FORESHOCK_HAS_CUDA)
    return true;
#else
    return false;
#endif
}

}  // namespace
}  // namespace foreshock

PYBIND11_MODULE(_kernels, m) {
    using namespace foreshock;
    m.doc() = "Compiled kernels; called by the cpu and cuda implementations of foreshock.ops.";
    m.def("isas", isas, "(name, supported here) of each instruction set, narrowest first.");
    m.def("has_cuda", has_cuda, "Whether CUDA kernels were built in.");
    m.def("thread_count", thread_count, "Threads that a kernel would use now.");
    py::class_<TensorTable>(m, "TensorTable", "Where a list of tensors lies in memory.")
        .def(py::init<const py::list&, const py::capsule&, const py::object&>(), py::arg("tensors"),
             py::arg("exchange_api"), py::arg("layout"))
        .def("matches", &TensorTable::matches, py::arg("tensors"),
             "Whether these are the same addresses, element types, shapes and strides.")
        .def("follow", &TensorTable::follow, py::arg("tensors"),
             "Whether only addresses differ, which are taken over; if not, the table is of no use.")
        .def_property_readonly("address", &TensorTable::address)
        .def("__len__", &TensorTable::size);
    py::class_<VectorReader>(m, "VectorReader", "Looks where vectors of one kind lie.")
        .def(py::init<const py::capsule&, py::type, std::int64_t, int, std::uintptr_t>(),
             py::arg("exchange_api"), py::arg("tensor_type"), py::arg("numel"),
             py::arg("type_bits"), py::arg("plan"));
    py::class_<RowsReader>(m, "RowsReader", "Looks where rows of one kind lie.")
        .def(py::init<const py::capsule&, py::type, std::int64_t, std::uintptr_t>(),
             py::arg("exchange_api"), py::arg("tensor_type"), py::arg("features"), py::arg("plan"));

    calibrated_scores::register_entry_points(Registrar(m, "calibrated_scores"));
    health_scan::register_entry_points(Registrar(m, "health_scan"));
    power_iteration::register_entry_points(Registrar(m, "power_iteration"));
    rolling_zscore::register_entry_points(Registrar(m, "rolling_zscore"));
    soft_assign::register_entry_points(Registrar(m, "soft_assign"));
}
