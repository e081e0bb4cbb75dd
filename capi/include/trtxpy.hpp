/* trtxpy for C++11 and later: header-only, over trtxpy.h, whose comments say what the functions do.
 *
 * Ownership. Objects own what they stand for and can be moved, not copied. A child keeps its parents alive, so they may be
 *   destroyed in any order. What is destroyed while a request in flight uses it is given back as soon as another object is
 *   destroyed after the request, or by shutdown().
 * Errors. A call that fails throws trtxpy::Error. Destructors do not throw.
 * Threads. As trtxpy.h: every call from any thread. Moving or destroying an object while another thread calls it is a race, as
 *   with any object.
 * Callbacks must not throw: std::terminate. */
#ifndef TRTXPY_HPP
#define TRTXPY_HPP

#include <chrono>
#include <cstddef>
#include <cstdint>
#include <exception>
#include <functional>
#include <future>
#include <iterator>
#include <list>
#include <memory>
#include <mutex>
#include <stdexcept>
#include <string>
#include <type_traits>
#include <utility>
#include <vector>

#include "trtxpy.h"

namespace trtxpy {

/* A status that is not TRTXPY_OK, and its text. */
class Error : public std::runtime_error {
  public:
    Error(trtxpy_status status, const std::string &text)
        : std::runtime_error(text.empty() ? std::string(trtxpy_status_name(status)) : text), status_(status) {}
    trtxpy_status status() const noexcept { return status_; }
    const char *name() const noexcept { return trtxpy_status_name(status_); }

  private:
    trtxpy_status status_;
};

using Shape = std::vector<std::int64_t>;

namespace detail {

inline void check(trtxpy_status status) {
    if (status != TRTXPY_OK) throw Error(status, trtxpy_last_error());
}

inline trtxpy_shape shape_of(const Shape &shape) {
    trtxpy_shape raw = {0, 0, {0, 0, 0, 0, 0, 0, 0, 0}};
    if (shape.size() > TRTXPY_MAX_RANK)
        throw Error(TRTXPY_INVALID_ARGUMENT, "a shape has " + std::to_string(shape.size()) + " axes; expected at most " +
                                                 std::to_string(TRTXPY_MAX_RANK));
    raw.rank = static_cast<std::int32_t>(shape.size());
    for (std::size_t i = 0; i < shape.size(); i++) raw.dims[i] = shape[i];
    return raw;
}

inline Shape shape_of(const trtxpy_shape &raw) {
    return Shape(raw.dims, raw.dims + raw.rank);
}

inline const char *text_or_null(const std::string &text) {
    return text.empty() ? nullptr : text.c_str();
}

inline std::string text_of(const char *text) {
    return text ? std::string(text) : std::string();
}

/* What could not be destroyed yet, because a request or a DLPack tensor uses it. */
class Waiting {
  public:
    virtual ~Waiting() = default;
    virtual trtxpy_status try_destroy() noexcept = 0;
};

struct Orphans {
    std::mutex mutex;
    std::list<std::unique_ptr<Waiting>> waiting;
};

inline Orphans &orphans() {
    static Orphans *const instance = new Orphans; /* kept until the process ends: others' destructors come here */
    return *instance;
}

/* Give back what nobody uses any more. */
inline void sweep() noexcept {
    for (bool again = true; again;) {
        again = false;
        std::list<std::unique_ptr<Waiting>> gone; /* their parents are released outside the lock */
        std::lock_guard<std::mutex> lock(orphans().mutex);
        auto &waiting = orphans().waiting;
        for (auto it = waiting.begin(); it != waiting.end();) {
            auto next = std::next(it);
            if ((*it)->try_destroy() != TRTXPY_BORROWED) {
                gone.splice(gone.end(), waiting, it);
                again = true;
            }
            it = next;
        }
    }
}

/* A handle, and the parents that must outlive it. */
template <typename Handle> class Owned {
  public:
    using Destroy = trtxpy_status (*)(Handle);
    using Parents = std::vector<std::shared_ptr<void>>;

    Owned(Handle handle, Destroy destroy, Parents parents)
        : handle_(handle), destroy_(destroy), parents_(std::move(parents)) {}
    Owned(const Owned &) = delete;
    Owned &operator=(const Owned &) = delete;
    ~Owned() {
        if (destroy_(handle_) == TRTXPY_BORROWED) adopt();
        sweep();
    }
    Handle get() const noexcept { return handle_; }

  private:
    class Orphan : public Waiting {
      public:
        Orphan(Handle handle, Destroy destroy, Parents parents)
            : handle_(handle), destroy_(destroy), parents_(std::move(parents)) {}
        trtxpy_status try_destroy() noexcept override { return destroy_(handle_); }

      private:
        Handle handle_;
        Destroy destroy_;
        Parents parents_;
    };

    void adopt() noexcept {
        try {
            std::unique_ptr<Waiting> orphan(new Orphan(handle_, destroy_, parents_));
            std::lock_guard<std::mutex> lock(orphans().mutex);
            orphans().waiting.push_back(std::move(orphan));
        } catch (...) { /* no memory for it: the handle stays open, which harms nobody */
        }
    }

    Handle handle_;
    Destroy destroy_;
    Parents parents_;
};

/* What Context, Graph, ... have in common. */
template <typename Handle> class Object {
  public:
    /* For functions of trtxpy.h; still the object's. NULL after a move. */
    Handle handle() const noexcept { return owned_ ? owned_->get() : nullptr; }

  protected:
    Object() = default;
    Object(Object &&) = default;
    Object &operator=(Object &&) = default;
    Object(const Object &) = delete;
    Object &operator=(const Object &) = delete;
    ~Object() = default;

    void own(Handle handle, typename Owned<Handle>::Destroy destroy, std::vector<std::shared_ptr<void>> parents) {
        try {
            owned_ = std::make_shared<Owned<Handle>>(handle, destroy, std::move(parents));
        } catch (...) {
            destroy(handle);
            throw;
        }
    }
    std::shared_ptr<void> keep() const { return owned_; }

  private:
    std::shared_ptr<Owned<Handle>> owned_;
};

} // namespace detail

/* ---- the library ---- */

inline std::string version() {
    return trtxpy_version();
}
/* Throws unless the library has the ABI of this header: the same major, and a minor that is not older. */
inline void check_abi() {
    const std::uint32_t built = TRTXPY_ABI_MAJOR << 16 | TRTXPY_ABI_MINOR, found = trtxpy_abi_version();
    if (found >> 16 != TRTXPY_ABI_MAJOR || found < built)
        throw Error(TRTXPY_VERSION_MISMATCH, "libtrtxpy has ABI " + std::to_string(found >> 16) + "." +
                                                 std::to_string(found & 0xffffu) + "; this program was built for " +
                                                 std::to_string(TRTXPY_ABI_MAJOR) + "." + std::to_string(TRTXPY_ABI_MINOR));
}
/* python: as in trtxpy_init_options; empty for the default. */
inline void init(const std::string &python = std::string()) {
    check_abi();
    trtxpy_init_options options = TRTXPY_INIT_OPTIONS_INIT;
    options.python = detail::text_or_null(python);
    detail::check(trtxpy_init(&options));
}
inline void shutdown() {
    detail::sweep();
    detail::check(trtxpy_shutdown());
}
inline std::size_t live_objects() {
    std::size_t count = 0;
    detail::check(trtxpy_live_objects(&count));
    return count;
}
inline std::size_t dtype_bytes(trtxpy_dtype dtype, const Shape &shape) {
    const trtxpy_shape raw = detail::shape_of(shape);
    std::size_t bytes = 0;
    detail::check(trtxpy_dtype_bytes(dtype, &raw, &bytes));
    return bytes;
}

/* ---- what calls take and give ---- */

/* Somebody else's bytes, for the length of a call. */
struct Bytes {
    const void *data = nullptr;
    std::size_t size = 0;
    Bytes() = default;
    Bytes(const void *data_, std::size_t size_) : data(data_), size(size_) {}
    Bytes(const std::string &text) : data(text.data()), size(text.size()) {}
    template <typename T> Bytes(const std::vector<T> &values) : data(values.data()), size(values.size() * sizeof(T)) {
        static_assert(!std::is_same<T, bool>::value, "std::vector<bool> has no bytes; use std::uint8_t");
    }
};

struct ContextOptions {
    std::string backend; /* empty: the default */
    std::int32_t device = 0;
    trtxpy_completion_mode completion = TRTXPY_LATENCY;
    std::uint64_t max_device_bytes = 0;
    std::string lean_library;
    std::uint32_t max_cached_models = 0;
    bool allow_host_code = false;
};

struct Range {
    std::string name;
    Shape min, opt, max;
};

struct GraphOptions {
    std::vector<Range> ranges;
    std::string precision;
    std::int32_t optimization_level = -1;
    std::uint32_t lanes = 0, slots = 0, max_graphs = 0;
    bool no_cuda_graphs = false;
};

struct DispatchOptions {
    std::chrono::nanoseconds timeout{0}; /* 0: for ever */
    bool resize_outputs = false;
};

struct SubmitOptions {
    std::uint64_t token = 0; /* the caller's, handed back */
    bool resize_outputs = false;
};

struct ContextInfo {
    std::string backend, tensorrt_version, device_name, compute_capability;
    std::uint64_t device_bytes = 0;
    bool is_mock = false;
    std::int32_t device = 0;
};

struct TensorInfo {
    std::string name;
    trtxpy_dtype dtype = TRTXPY_FLOAT32;
    trtxpy_dtype engine_dtype = TRTXPY_FLOAT32;
    Shape shape; /* -1: not fixed */
};

struct NamedShape {
    std::string name;
    Shape shape;
};

class Tensor;
class Queue;

/* A tensor by the name that the graph has for it. The tensor must live for the call that takes this. */
struct Binding {
    std::string name;
    const Tensor *tensor;
    Binding(std::string name_, const Tensor &tensor_) : name(std::move(name_)), tensor(&tensor_) {}
};
using Bindings = std::vector<Binding>;

/* An input of Context::run: somebody else's data, for the length of the call. */
struct Input {
    std::string name;
    trtxpy_dtype dtype;
    Shape shape;
    Bytes data;
};

/* One of the Results, valid until they are destroyed. */
struct Output {
    std::string name;
    trtxpy_dtype dtype = TRTXPY_FLOAT32;
    Shape shape;
    const void *data = nullptr;
    std::size_t bytes = 0;
};

/* message: NULL for success. Runs on a thread of the library's; must not throw, nor wait for a request. */
using Callback = std::function<void(trtxpy_status status, const char *message, const trtxpy_result &result)>;

namespace detail {

/* The C structs of C++ options; valid while those are. */
struct RawGraphOptions {
    std::vector<trtxpy_profile_range> ranges;
    trtxpy_graph_options options;
    explicit RawGraphOptions(const GraphOptions &given) {
        trtxpy_graph_options raw = TRTXPY_GRAPH_OPTIONS_INIT;
        for (const Range &range : given.ranges)
            ranges.push_back({range.name.c_str(), shape_of(range.min), shape_of(range.opt), shape_of(range.max)});
        raw.ranges = ranges.empty() ? nullptr : ranges.data();
        raw.range_count = ranges.size();
        raw.precision = text_or_null(given.precision);
        raw.optimization_level = given.optimization_level;
        raw.lanes = given.lanes;
        raw.slots = given.slots;
        raw.max_graphs = given.max_graphs;
        raw.no_cuda_graphs = given.no_cuda_graphs;
        options = raw;
    }
    RawGraphOptions(const RawGraphOptions &) = delete;
    RawGraphOptions &operator=(const RawGraphOptions &) = delete;
};

inline std::vector<trtxpy_named_shape> raw_shapes(const std::vector<NamedShape> &shapes) {
    std::vector<trtxpy_named_shape> raw;
    for (const NamedShape &shape : shapes) raw.push_back({shape.name.c_str(), shape_of(shape.shape)});
    return raw;
}

} // namespace detail

/* ---- tensors ---- */

class Tensor : public detail::Object<trtxpy_tensor> {
  public:
    trtxpy_dtype dtype() const { return describe().dtype; }
    trtxpy_location location() const { return describe().location; }
    Shape shape() const { return detail::shape_of(describe().shape); }
    std::size_t bytes() const {
        std::size_t bytes = 0;
        detail::check(trtxpy_tensor_bytes(handle(), &bytes));
        return bytes;
    }
    void resize(const Shape &shape) {
        const trtxpy_shape raw = detail::shape_of(shape);
        detail::check(trtxpy_tensor_resize(handle(), &raw));
    }
    void write(const Bytes &content) { detail::check(trtxpy_tensor_write(handle(), content.data, content.size)); }
    void read(void *content, std::size_t bytes) const { detail::check(trtxpy_tensor_read(handle(), content, bytes)); }
    /* The content as a vector of T; TRTXPY_BUFFER_SIZE if it is no whole number of them. */
    template <typename T> std::vector<T> read() const {
        static_assert(!std::is_same<T, bool>::value, "std::vector<bool> has no bytes; use std::uint8_t");
        const std::size_t all = bytes();
        if (all % sizeof(T))
            throw Error(TRTXPY_BUFFER_SIZE, "the tensor has " + std::to_string(all) + " bytes; expected a multiple of " +
                                                std::to_string(sizeof(T)));
        std::vector<T> content(all / sizeof(T));
        read(content.data(), all);
        return content;
    }
    /* The memory itself: see trtxpy_tensor_data. */
    void *data() const {
        void *address = nullptr;
        detail::check(trtxpy_tensor_data(handle(), &address));
        return address;
    }
    /* The caller calls its deleter; see trtxpy_tensor_to_dlpack. */
    struct DLManagedTensor *to_dlpack() const {
        struct DLManagedTensor *managed = nullptr;
        detail::check(trtxpy_tensor_to_dlpack(handle(), &managed));
        return managed;
    }

  private:
    friend class Context;
    friend class Graph;
    Tensor(trtxpy_tensor handle, std::vector<std::shared_ptr<void>> parents) {
        own(handle, trtxpy_tensor_destroy, std::move(parents));
    }
    trtxpy_tensor_desc describe() const {
        trtxpy_tensor_desc desc = TRTXPY_TENSOR_DESC_INIT;
        detail::check(trtxpy_tensor_describe(handle(), &desc));
        return desc;
    }
};

namespace detail {

inline std::vector<trtxpy_binding> raw_bindings(const Bindings &bindings) {
    std::vector<trtxpy_binding> raw;
    for (const Binding &binding : bindings) raw.push_back({binding.name.c_str(), binding.tensor->handle()});
    return raw;
}

/* What a request's completion calls, exactly once. */
extern "C" inline void trtxpy_cpp_complete(trtxpy_status status, const char *message, const trtxpy_result *result,
                                           void *userdata) noexcept {
    std::unique_ptr<Callback> callback(static_cast<Callback *>(userdata));
    (*callback)(status, message, *result);
}

} // namespace detail

/* ---- requests ---- */

/* Destroying it does not cancel the request. */
class Request : public detail::Object<trtxpy_request> {
  public:
    /* Throws the request's error. */
    void wait() const { wait_for(std::chrono::nanoseconds::max()); }
    /* False if it is still in flight after that time; throws the request's error. */
    bool wait_for(std::chrono::nanoseconds timeout) const {
        trtxpy_status outcome = TRTXPY_OK;
        const std::uint64_t ns = timeout == std::chrono::nanoseconds::max() ? UINT64_MAX
                                 : timeout.count() > 0                      ? static_cast<std::uint64_t>(timeout.count())
                                                                            : 0;
        const trtxpy_status status = trtxpy_request_wait(handle(), ns, &outcome);
        if (status == TRTXPY_TIMEOUT || status == TRTXPY_NOT_READY) return false;
        detail::check(status);
        detail::check(outcome);
        return true;
    }
    /* False if it is complete already. */
    bool cancel() const {
        const trtxpy_status status = trtxpy_request_cancel(handle());
        if (status == TRTXPY_NOT_FOUND) return false;
        detail::check(status);
        return true;
    }

  private:
    friend class Graph;
    Request(trtxpy_request handle, std::vector<std::shared_ptr<void>> parents) {
        own(handle, trtxpy_request_destroy, std::move(parents));
    }
};

class Queue : public detail::Object<trtxpy_queue> {
  public:
    /* Readable while there is something to take. Only poll it. */
    int fd() const {
        int fd = -1;
        detail::check(trtxpy_queue_fd(handle(), &fd));
        return fd;
    }
    /* Up to `most` completions, oldest first; never waits. */
    std::vector<trtxpy_completion> take(std::size_t most = 16) const {
        std::vector<trtxpy_completion> completions(most);
        std::size_t taken = 0;
        detail::check(trtxpy_queue_take(handle(), completions.data(), most, &taken));
        completions.resize(taken);
        return completions;
    }

  private:
    friend class Context;
    friend class Graph;
    Queue(trtxpy_queue handle, std::vector<std::shared_ptr<void>> parents) {
        own(handle, trtxpy_queue_destroy, std::move(parents));
    }
};

/* ---- graphs ---- */

class Graph : public detail::Object<trtxpy_graph> {
  public:
    std::vector<TensorInfo> inputs() const { return tensors(TRTXPY_INPUT); }
    std::vector<TensorInfo> outputs() const { return tensors(TRTXPY_OUTPUT); }

    void prepare(const std::vector<NamedShape> &inputs) const {
        const std::vector<trtxpy_named_shape> raw = detail::raw_shapes(inputs);
        detail::check(trtxpy_graph_prepare(handle(), raw.data(), raw.size()));
    }
    /* In the order of outputs(). */
    std::vector<Shape> output_shapes(const std::vector<NamedShape> &inputs) const {
        const std::vector<trtxpy_named_shape> raw = detail::raw_shapes(inputs);
        std::vector<trtxpy_shape> found(count(TRTXPY_OUTPUT));
        detail::check(trtxpy_graph_output_shapes(handle(), raw.data(), raw.size(), found.data(), found.size()));
        std::vector<Shape> shapes;
        for (const trtxpy_shape &shape : found) shapes.push_back(detail::shape_of(shape));
        return shapes;
    }
    std::vector<std::uint8_t> plan() const {
        std::size_t bytes = 0;
        detail::check(trtxpy_graph_get_plan(handle(), nullptr, &bytes));
        std::vector<std::uint8_t> plan(bytes);
        detail::check(trtxpy_graph_get_plan(handle(), plan.data(), &bytes));
        plan.resize(bytes);
        return plan;
    }
    trtxpy_graph_statistics statistics() const {
        trtxpy_graph_statistics statistics = TRTXPY_GRAPH_STATISTICS_INIT;
        detail::check(trtxpy_graph_get_statistics(handle(), &statistics));
        return statistics;
    }
    /* Inputs and outputs in the pinned memory of one captured graph; see trtxpy_graph_create_tensors. */
    std::pair<std::vector<Tensor>, std::vector<Tensor>> create_tensors(const std::vector<NamedShape> &shapes) const {
        const std::vector<trtxpy_named_shape> raw = detail::raw_shapes(shapes);
        std::vector<trtxpy_tensor> in(count(TRTXPY_INPUT)), out(count(TRTXPY_OUTPUT));
        std::pair<std::vector<Tensor>, std::vector<Tensor>> made;
        made.first.reserve(in.size());
        made.second.reserve(out.size());
        detail::check(trtxpy_graph_create_tensors(handle(), raw.data(), raw.size(), in.data(), in.size(), out.data(),
                                                  out.size()));
        for (trtxpy_tensor tensor : in) made.first.push_back(Tensor(tensor, parents()));
        for (trtxpy_tensor tensor : out) made.second.push_back(Tensor(tensor, parents()));
        return made;
    }

    /* Run and wait. */
    void dispatch(const Bindings &inputs, const Bindings &outputs, const DispatchOptions &options = DispatchOptions()) const {
        const std::vector<trtxpy_binding> in = detail::raw_bindings(inputs), out = detail::raw_bindings(outputs);
        trtxpy_dispatch_options raw = TRTXPY_DISPATCH_OPTIONS_INIT;
        raw.timeout_ns = options.timeout.count() > 0 ? static_cast<std::uint64_t>(options.timeout.count()) : 0;
        raw.resize_outputs = options.resize_outputs;
        detail::check(trtxpy_dispatch(handle(), in.data(), in.size(), out.data(), out.size(), &raw));
    }
    /* Run without waiting; nobody is told. */
    Request submit(const Bindings &inputs, const Bindings &outputs, const SubmitOptions &options = SubmitOptions()) const {
        return submit_raw(inputs, outputs, raw_options(options), [] {});
    }
    /* The callback is called exactly once, unless this throws. */
    Request submit(const Bindings &inputs, const Bindings &outputs, Callback callback,
                   const SubmitOptions &options = SubmitOptions()) const {
        if (!callback) throw Error(TRTXPY_INVALID_ARGUMENT, "the callback is empty; expected a function");
        std::unique_ptr<Callback> held(new Callback(std::move(callback)));
        trtxpy_submit_options raw = raw_options(options);
        raw.callback = detail::trtxpy_cpp_complete;
        raw.userdata = held.get();
        return submit_raw(inputs, outputs, raw, [&held] { held.release(); });
    }
    /* The completion goes to the queue, with the token. */
    Request submit(const Bindings &inputs, const Bindings &outputs, const Queue &queue,
                   const SubmitOptions &options = SubmitOptions()) const {
        trtxpy_submit_options raw = raw_options(options);
        raw.queue = queue.handle();
        return submit_raw(inputs, outputs, raw, [] {});
    }
    /* The future has the result, or throws the request's error. Its destructor does not wait. */
    std::future<trtxpy_result> submit_future(const Bindings &inputs, const Bindings &outputs,
                                             const SubmitOptions &options = SubmitOptions()) const {
        auto promise = std::make_shared<std::promise<trtxpy_result>>();
        std::future<trtxpy_result> future = promise->get_future();
        const Callback keep_promise = [promise](trtxpy_status status, const char *message, const trtxpy_result &result) {
            if (status == TRTXPY_OK)
                promise->set_value(result);
            else
                promise->set_exception(std::make_exception_ptr(Error(status, detail::text_of(message))));
        };
        submit(inputs, outputs, keep_promise, options);
        return future;
    }

  private:
    friend class Context;
    Graph(trtxpy_graph handle, std::shared_ptr<void> context) : context_(std::move(context)) {
        own(handle, trtxpy_graph_destroy, {context_});
    }
    std::vector<std::shared_ptr<void>> parents() const { return {keep(), context_}; }
    std::size_t count(trtxpy_direction direction) const {
        std::size_t count = 0;
        detail::check(trtxpy_graph_tensor_count(handle(), direction, &count));
        return count;
    }
    std::vector<TensorInfo> tensors(trtxpy_direction direction) const {
        std::vector<TensorInfo> found(count(direction));
        for (std::size_t i = 0; i < found.size(); i++) {
            trtxpy_tensor_info raw = TRTXPY_TENSOR_INFO_INIT;
            detail::check(trtxpy_graph_tensor_info(handle(), direction, i, &raw));
            found[i].name = detail::text_of(raw.name);
            found[i].dtype = raw.dtype;
            found[i].engine_dtype = raw.engine_dtype;
            found[i].shape = detail::shape_of(raw.shape);
        }
        return found;
    }
    static trtxpy_submit_options raw_options(const SubmitOptions &options) {
        trtxpy_submit_options raw = TRTXPY_SUBMIT_OPTIONS_INIT;
        raw.token = options.token;
        raw.resize_outputs = options.resize_outputs;
        return raw;
    }
    /* accepted: the completion will come, and owns what it was given. */
    template <typename Accepted>
    Request submit_raw(const Bindings &inputs, const Bindings &outputs, const trtxpy_submit_options &options,
                       Accepted accepted) const {
        const std::vector<trtxpy_binding> in = detail::raw_bindings(inputs), out = detail::raw_bindings(outputs);
        trtxpy_request request = nullptr;
        detail::check(trtxpy_submit(handle(), in.data(), in.size(), out.data(), out.size(), &options, &request));
        accepted();
        return Request(request, parents());
    }

    std::shared_ptr<void> context_;
};

/* ---- contexts ---- */

class Results : public detail::Object<trtxpy_results> {
  public:
    std::size_t size() const {
        std::size_t count = 0;
        detail::check(trtxpy_results_count(handle(), &count));
        return count;
    }
    Output operator[](std::size_t index) const {
        trtxpy_array raw = TRTXPY_ARRAY_INIT;
        detail::check(trtxpy_results_get(handle(), index, &raw));
        Output output;
        output.name = detail::text_of(raw.name);
        output.dtype = raw.dtype;
        output.shape = detail::shape_of(raw.shape);
        output.data = raw.data;
        output.bytes = raw.bytes;
        return output;
    }

  private:
    friend class Context;
    Results(trtxpy_results handle, std::shared_ptr<void> context) {
        own(handle, trtxpy_results_destroy, {std::move(context)});
    }
};

class Context : public detail::Object<trtxpy_context> {
  public:
    explicit Context(const ContextOptions &options = ContextOptions()) {
        check_abi();
        trtxpy_context_options raw = TRTXPY_CONTEXT_OPTIONS_INIT;
        raw.backend = detail::text_or_null(options.backend);
        raw.device = options.device;
        raw.completion = options.completion;
        raw.max_device_bytes = options.max_device_bytes;
        raw.lean_library = detail::text_or_null(options.lean_library);
        raw.max_cached_models = options.max_cached_models;
        raw.allow_host_code = options.allow_host_code;
        trtxpy_context context = nullptr;
        detail::check(trtxpy_context_create(&raw, &context));
        own(context, trtxpy_context_destroy, {});
    }

    ContextInfo describe() const {
        trtxpy_context_info raw = TRTXPY_CONTEXT_INFO_INIT;
        detail::check(trtxpy_context_describe(handle(), &raw));
        ContextInfo info;
        info.backend = detail::text_of(raw.backend);
        info.tensorrt_version = detail::text_of(raw.tensorrt_version);
        info.device_name = detail::text_of(raw.device_name);
        info.compute_capability = detail::text_of(raw.compute_capability);
        info.device_bytes = raw.device_bytes;
        info.is_mock = raw.is_mock != 0;
        info.device = raw.device;
        return info;
    }
    trtxpy_context_statistics statistics() const {
        trtxpy_context_statistics statistics = TRTXPY_CONTEXT_STATISTICS_INIT;
        detail::check(trtxpy_context_get_statistics(handle(), &statistics));
        return statistics;
    }

    Graph graph_from_onnx(const Bytes &model, const GraphOptions &options = GraphOptions(),
                          const Bytes &weights = Bytes()) const {
        const detail::RawGraphOptions raw(options);
        trtxpy_graph graph = nullptr;
        detail::check(trtxpy_graph_from_onnx(handle(), model.data, model.size, weights.data, weights.size, &raw.options,
                                             &graph));
        return Graph(graph, keep());
    }
    Graph graph_from_plan(const Bytes &plan, const GraphOptions &options = GraphOptions()) const {
        const detail::RawGraphOptions raw(options);
        trtxpy_graph graph = nullptr;
        detail::check(trtxpy_graph_from_plan(handle(), plan.data, plan.size, &raw.options, &graph));
        return Graph(graph, keep());
    }
    Graph graph_from_file(const std::string &path, const GraphOptions &options = GraphOptions()) const {
        const detail::RawGraphOptions raw(options);
        trtxpy_graph graph = nullptr;
        detail::check(trtxpy_graph_from_file(handle(), path.c_str(), &raw.options, &graph));
        return Graph(graph, keep());
    }

    /* Filled with zeros. */
    Tensor tensor(trtxpy_dtype dtype, const Shape &shape, trtxpy_location location = TRTXPY_HOST) const {
        trtxpy_tensor_desc desc = TRTXPY_TENSOR_DESC_INIT;
        desc.dtype = dtype;
        desc.location = location;
        desc.shape = detail::shape_of(shape);
        trtxpy_tensor tensor = nullptr;
        detail::check(trtxpy_tensor_create(handle(), &desc, &tensor));
        return Tensor(tensor, {keep()});
    }
    /* Takes `managed` over, unless it throws. */
    Tensor tensor_from_dlpack(struct DLManagedTensor *managed) const {
        trtxpy_tensor tensor = nullptr;
        detail::check(trtxpy_tensor_from_dlpack(handle(), managed, &tensor));
        return Tensor(tensor, {keep()});
    }
    Queue queue() const {
        trtxpy_queue queue = nullptr;
        detail::check(trtxpy_queue_create(handle(), &queue));
        return Queue(queue, {keep()});
    }

    /* Build, load and run; the engine is kept by content. */
    Results run(const Bytes &model, const std::vector<Input> &inputs, const GraphOptions &options = GraphOptions(),
                const Bytes &weights = Bytes()) const {
        const detail::RawGraphOptions raw(options);
        std::vector<trtxpy_array> arrays;
        for (const Input &input : inputs) {
            trtxpy_array array = TRTXPY_ARRAY_INIT;
            array.name = input.name.c_str();
            array.dtype = input.dtype;
            array.shape = detail::shape_of(input.shape);
            array.data = input.data.data;
            array.bytes = input.data.size;
            arrays.push_back(array);
        }
        trtxpy_results results = nullptr;
        detail::check(trtxpy_run(handle(), model.data, model.size, weights.data, weights.size, arrays.data(), arrays.size(),
                                 &raw.options, &results));
        return Results(results, keep());
    }
    Results run_zeroed(const Bytes &model, const GraphOptions &options = GraphOptions(), const Bytes &weights = Bytes()) const {
        const detail::RawGraphOptions raw(options);
        trtxpy_results results = nullptr;
        detail::check(trtxpy_run_zeroed(handle(), model.data, model.size, weights.data, weights.size, &raw.options, &results));
        return Results(results, keep());
    }
};

} // namespace trtxpy

#endif
