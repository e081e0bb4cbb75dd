//! `trtxpy.h` as it is, for what the safe types do not have: DLPack, say. Names and meaning are the header's.
//!
//! A test compares every struct, constant and function here with the header, through a C compiler.

#![allow(non_camel_case_types)] // the header's names

use std::ffi::{c_char, c_int, c_void, CStr};

/// A struct's member, for [`Layout`].
#[derive(Debug, Clone, Copy)]
pub struct Member {
    /// Its name.
    pub name: &'static str,
    /// Where it is, in bytes.
    pub offset: usize,
    /// Its type, in Rust's words.
    pub kind: &'static str,
}

/// How a struct lies in memory: what a test compares with C.
#[derive(Debug, Clone, Copy)]
pub struct Layout {
    /// The struct's name.
    pub name: &'static str,
    /// Its size in bytes.
    pub size: usize,
    /// Its alignment in bytes.
    pub alignment: usize,
    /// Its members.
    pub members: &'static [Member],
}

/// A function's declaration: what a test compares with C.
#[derive(Debug, Clone, Copy)]
pub struct Function {
    /// The symbol.
    pub name: &'static str,
    /// The types of its arguments, in Rust's words.
    pub arguments: &'static [&'static str],
    /// The type of what it returns, in Rust's words.
    pub returns: &'static str,
}

macro_rules! structs {
    ($(struct $name:ident { $($member:ident: $kind:ty),* $(,)? })*) => {
        $(
            #[doc = concat!("`", stringify!($name), "` of `trtxpy.h`.")]
            #[repr(C)]
            #[derive(Debug, Clone, Copy)]
            pub struct $name {
                $(
                    #[doc = concat!("`", stringify!($member), "` of `", stringify!($name), "`.")]
                    pub $member: $kind,
                )*
            }
        )*
        /// Every struct of this module.
        pub const LAYOUTS: &[Layout] = &[$(Layout {
            name: stringify!($name),
            size: std::mem::size_of::<$name>(),
            alignment: std::mem::align_of::<$name>(),
            members: &[$(Member {
                name: stringify!($member),
                offset: std::mem::offset_of!($name, $member),
                kind: stringify!($kind),
            }),*],
        }),*];
    };
}

macro_rules! constants {
    ($($name:ident: $kind:ty = $value:expr;)*) => {
        $(
            #[doc = concat!("`", stringify!($name), "` of `trtxpy.h`.")]
            pub const $name: $kind = $value;
        )*
        /// Every constant of this module.
        pub const CONSTANTS: &[(&str, i64)] = &[$((stringify!($name), $name as i64)),*];
    };
}

macro_rules! functions {
    ($(fn $name:ident($($argument:ident: $kind:ty),* $(,)?) -> $returns:ty;)*) => {
        /// The library's functions.
        #[derive(Clone, Copy)]
        pub struct Api {
            $(
                #[doc = concat!("`", stringify!($name), "` of `trtxpy.h`, which says what must hold for the call.")]
                pub $name: unsafe extern "C" fn($($argument: $kind),*) -> $returns,
            )*
        }

        impl Api {
            /// Look every function up. Returns the names of those that are missing.
            ///
            /// # Safety
            /// What `find` returns for a name is NULL or the address of the function that `trtxpy.h` declares so.
            pub(crate) unsafe fn load(find: impl Fn(&CStr) -> *mut c_void) -> Result<Api, Vec<&'static str>> {
                let mut missing = Vec::new();
                $(
                    let symbol = concat!(stringify!($name), "\0").as_bytes();
                    let $name = find(CStr::from_bytes_with_nul(symbol).expect("one NUL, at the end"));
                    if $name.is_null() {
                        missing.push(stringify!($name));
                    }
                )*
                if !missing.is_empty() {
                    return Err(missing);
                }
                // SAFETY: not NULL, and the function of that name.
                Ok(unsafe { Api {
                    $($name: std::mem::transmute::<*mut c_void, unsafe extern "C" fn($($argument: $kind),*) -> $returns>(
                        $name,
                    ),)*
                } })
            }
        }

        /// Every function of this module.
        pub const FUNCTIONS: &[Function] = &[$(Function {
            name: stringify!($name),
            arguments: &[$(stringify!($kind)),*],
            returns: stringify!($returns),
        }),*];
    };
}

macro_rules! opaque {
    ($($handle:ident -> $object:ident;)*) => {
        $(
            #[doc = concat!("What `", stringify!($handle), "` stands for; only the library can look at it.")]
            #[repr(C)]
            pub struct $object {
                _private: [u8; 0],
            }
            #[doc = concat!("`", stringify!($handle), "` of `trtxpy.h`: a handle, not an address.")]
            pub type $handle = *mut $object;
        )*
    };
}

opaque! {
    trtxpy_context -> trtxpy_context_handle;
    trtxpy_graph -> trtxpy_graph_handle;
    trtxpy_tensor -> trtxpy_tensor_handle;
    trtxpy_request -> trtxpy_request_handle;
    trtxpy_queue -> trtxpy_queue_handle;
    trtxpy_results -> trtxpy_results_handle;
}

/// DLPack's struct; `dlpack.h` defines it.
#[repr(C)]
pub struct DLManagedTensor {
    _private: [u8; 0],
}

/// `trtxpy_status` of `trtxpy.h`.
pub type trtxpy_status = i32;
/// `trtxpy_dtype` of `trtxpy.h`.
pub type trtxpy_dtype = i32;
/// `trtxpy_completion_mode` of `trtxpy.h`.
pub type trtxpy_completion_mode = i32;
/// `trtxpy_direction` of `trtxpy.h`.
pub type trtxpy_direction = i32;
/// `trtxpy_location` of `trtxpy.h`.
pub type trtxpy_location = i32;
/// `trtxpy_callback` of `trtxpy.h`.
pub type trtxpy_callback =
    Option<unsafe extern "C" fn(trtxpy_status, *const c_char, *const trtxpy_result, *mut c_void)>;

constants! {
    TRTXPY_ABI_MAJOR: u32 = 1;
    TRTXPY_ABI_MINOR: u32 = 0;
    TRTXPY_MAX_RANK: usize = 8;

    TRTXPY_OK: trtxpy_status = 0;
    TRTXPY_INVALID_ARGUMENT: trtxpy_status = 1;
    TRTXPY_INVALID_HANDLE: trtxpy_status = 2;
    TRTXPY_BORROWED: trtxpy_status = 3;
    TRTXPY_NOT_FOUND: trtxpy_status = 4;
    TRTXPY_SHAPE: trtxpy_status = 5;
    TRTXPY_DTYPE: trtxpy_status = 6;
    TRTXPY_RANGE: trtxpy_status = 7;
    TRTXPY_BUFFER_SIZE: trtxpy_status = 8;
    TRTXPY_OUT_OF_MEMORY: trtxpy_status = 9;
    TRTXPY_UNAVAILABLE: trtxpy_status = 10;
    TRTXPY_PYTHON: trtxpy_status = 11;
    TRTXPY_PARSE: trtxpy_status = 12;
    TRTXPY_BUILD: trtxpy_status = 13;
    TRTXPY_PLAN: trtxpy_status = 14;
    TRTXPY_VERSION_MISMATCH: trtxpy_status = 15;
    TRTXPY_EXECUTION: trtxpy_status = 16;
    TRTXPY_CUDA: trtxpy_status = 17;
    TRTXPY_CANCELLED: trtxpy_status = 18;
    TRTXPY_TIMEOUT: trtxpy_status = 19;
    TRTXPY_BUSY: trtxpy_status = 20;
    TRTXPY_CLOSED: trtxpy_status = 21;
    TRTXPY_IN_CALLBACK: trtxpy_status = 22;
    TRTXPY_FORKED: trtxpy_status = 23;
    TRTXPY_NOT_READY: trtxpy_status = 24;
    TRTXPY_UNSUPPORTED: trtxpy_status = 25;
    TRTXPY_INTERNAL: trtxpy_status = 26;

    TRTXPY_FLOAT32: trtxpy_dtype = 0;
    TRTXPY_FLOAT16: trtxpy_dtype = 1;
    TRTXPY_INT32: trtxpy_dtype = 2;
    TRTXPY_UINT32: trtxpy_dtype = 3;
    TRTXPY_INT64: trtxpy_dtype = 4;
    TRTXPY_UINT64: trtxpy_dtype = 5;
    TRTXPY_INT8: trtxpy_dtype = 6;
    TRTXPY_UINT8: trtxpy_dtype = 7;
    TRTXPY_INT4: trtxpy_dtype = 8;
    TRTXPY_UINT4: trtxpy_dtype = 9;
    TRTXPY_BOOL: trtxpy_dtype = 16;
    TRTXPY_BFLOAT16: trtxpy_dtype = 17;
    TRTXPY_FLOAT8: trtxpy_dtype = 18;

    TRTXPY_LATENCY: trtxpy_completion_mode = 0;
    TRTXPY_BALANCED: trtxpy_completion_mode = 1;
    TRTXPY_EFFICIENT: trtxpy_completion_mode = 2;

    TRTXPY_INPUT: trtxpy_direction = 0;
    TRTXPY_OUTPUT: trtxpy_direction = 1;

    TRTXPY_HOST: trtxpy_location = 0;
    TRTXPY_DEVICE: trtxpy_location = 1;
    TRTXPY_FOREIGN_HOST: trtxpy_location = 2;
    TRTXPY_FOREIGN_DEVICE: trtxpy_location = 3;
}

structs! {
    struct trtxpy_init_options {
        struct_size: usize,
        python: *const c_char,
    }
    struct trtxpy_shape {
        rank: i32,
        reserved: i32,
        dims: [i64; 8],
    }
    struct trtxpy_context_options {
        struct_size: usize,
        backend: *const c_char,
        device: i32,
        completion: trtxpy_completion_mode,
        max_device_bytes: u64,
        lean_library: *const c_char,
        max_cached_models: u32,
        allow_host_code: u32,
    }
    struct trtxpy_context_info {
        struct_size: usize,
        backend: *const c_char,
        tensorrt_version: *const c_char,
        device_name: *const c_char,
        compute_capability: *const c_char,
        device_bytes: u64,
        is_mock: i32,
        device: i32,
    }
    struct trtxpy_context_statistics {
        struct_size: usize,
        device_bytes: u64,
        device_peak_bytes: u64,
        device_allocations: u64,
        pinned_bytes: u64,
        pinned_peak_bytes: u64,
        pinned_allocations: u64,
        graphs: u64,
        tensors: u64,
        queues: u64,
        requests: u64,
        cached_models: u64,
        cache_hits: u64,
        cache_misses: u64,
    }
    struct trtxpy_profile_range {
        name: *const c_char,
        min: trtxpy_shape,
        opt: trtxpy_shape,
        max: trtxpy_shape,
    }
    struct trtxpy_graph_options {
        struct_size: usize,
        ranges: *const trtxpy_profile_range,
        range_count: usize,
        precision: *const c_char,
        optimization_level: i32,
        lanes: u32,
        slots: u32,
        max_graphs: u32,
        no_cuda_graphs: u32,
        reserved: u32,
    }
    struct trtxpy_tensor_info {
        struct_size: usize,
        name: *const c_char,
        dtype: trtxpy_dtype,
        engine_dtype: trtxpy_dtype,
        shape: trtxpy_shape,
    }
    struct trtxpy_named_shape {
        name: *const c_char,
        shape: trtxpy_shape,
    }
    struct trtxpy_graph_statistics {
        struct_size: usize,
        submitted: u64,
        completed: u64,
        failed: u64,
        cancelled: u64,
        captured: u64,
        uncaptured: u64,
        zero_copy: u64,
        in_flight: u64,
        queued: u64,
        shapes: u64,
        slots: u64,
    }
    struct trtxpy_tensor_desc {
        struct_size: usize,
        dtype: trtxpy_dtype,
        location: trtxpy_location,
        shape: trtxpy_shape,
    }
    struct trtxpy_binding {
        name: *const c_char,
        tensor: trtxpy_tensor,
    }
    struct trtxpy_dispatch_options {
        struct_size: usize,
        timeout_ns: u64,
        resize_outputs: u32,
        reserved: u32,
    }
    struct trtxpy_result {
        struct_size: usize,
        token: u64,
        submitted_ns: u64,
        launched_ns: u64,
        completed_ns: u64,
        captured: i32,
        reserved: i32,
    }
    struct trtxpy_submit_options {
        struct_size: usize,
        callback: trtxpy_callback,
        userdata: *mut c_void,
        queue: trtxpy_queue,
        token: u64,
        resize_outputs: u32,
        reserved: u32,
    }
    struct trtxpy_completion {
        status: trtxpy_status,
        reserved: i32,
        result: trtxpy_result,
        message: [c_char; 512],
    }
    struct trtxpy_array {
        struct_size: usize,
        name: *const c_char,
        dtype: trtxpy_dtype,
        reserved: i32,
        shape: trtxpy_shape,
        data: *const c_void,
        bytes: usize,
    }
}

macro_rules! initialised {
    ($($name:ident { $($member:ident: $value:expr),* })*) => {
        $(
            impl Default for $name {
                /// What the header's INIT macro has.
                fn default() -> Self {
                    // SAFETY: integers, pointers and a callback that may be none: zeros are values of all of them.
                    let zeros: Self = unsafe { std::mem::zeroed() };
                    Self { struct_size: std::mem::size_of::<Self>(), $($member: $value,)* ..zeros }
                }
            }
        )*
    };
}

initialised! {
    trtxpy_init_options {}
    trtxpy_context_options {}
    trtxpy_context_info {}
    trtxpy_context_statistics {}
    trtxpy_graph_options { optimization_level: -1 }
    trtxpy_tensor_info {}
    trtxpy_graph_statistics {}
    trtxpy_tensor_desc {}
    trtxpy_dispatch_options {}
    trtxpy_submit_options {}
    trtxpy_array {}
}

impl Default for trtxpy_shape {
    /// A scalar's.
    fn default() -> Self {
        Self { rank: 0, reserved: 0, dims: [0; TRTXPY_MAX_RANK] }
    }
}

impl Default for trtxpy_completion {
    /// Room for [`Api::trtxpy_queue_take`].
    fn default() -> Self {
        // SAFETY: integers only.
        unsafe { std::mem::zeroed() }
    }
}

functions! {
    fn trtxpy_status_name(status: trtxpy_status) -> *const c_char;
    fn trtxpy_last_error() -> *const c_char;
    fn trtxpy_last_status() -> trtxpy_status;

    fn trtxpy_abi_version() -> u32;
    fn trtxpy_version() -> *const c_char;
    fn trtxpy_init(options: *const trtxpy_init_options) -> trtxpy_status;
    fn trtxpy_shutdown() -> trtxpy_status;
    fn trtxpy_live_objects(count: *mut usize) -> trtxpy_status;

    fn trtxpy_dtype_name(dtype: trtxpy_dtype) -> *const c_char;
    fn trtxpy_dtype_bytes(dtype: trtxpy_dtype, shape: *const trtxpy_shape, bytes: *mut usize) -> trtxpy_status;

    fn trtxpy_context_create(options: *const trtxpy_context_options, context: *mut trtxpy_context) -> trtxpy_status;
    fn trtxpy_context_destroy(context: trtxpy_context) -> trtxpy_status;
    fn trtxpy_context_describe(context: trtxpy_context, info: *mut trtxpy_context_info) -> trtxpy_status;
    fn trtxpy_context_get_statistics(
        context: trtxpy_context, statistics: *mut trtxpy_context_statistics
    ) -> trtxpy_status;

    fn trtxpy_graph_from_onnx(
        context: trtxpy_context, model: *const c_void, model_bytes: usize, weights: *const c_void,
        weights_bytes: usize, options: *const trtxpy_graph_options, graph: *mut trtxpy_graph
    ) -> trtxpy_status;
    fn trtxpy_graph_from_plan(
        context: trtxpy_context, plan: *const c_void, plan_bytes: usize, options: *const trtxpy_graph_options,
        graph: *mut trtxpy_graph
    ) -> trtxpy_status;
    fn trtxpy_graph_from_file(
        context: trtxpy_context, path: *const c_char, options: *const trtxpy_graph_options, graph: *mut trtxpy_graph
    ) -> trtxpy_status;
    fn trtxpy_graph_destroy(graph: trtxpy_graph) -> trtxpy_status;
    fn trtxpy_graph_get_plan(graph: trtxpy_graph, plan: *mut c_void, bytes: *mut usize) -> trtxpy_status;
    fn trtxpy_graph_tensor_count(
        graph: trtxpy_graph, direction: trtxpy_direction, count: *mut usize
    ) -> trtxpy_status;
    fn trtxpy_graph_tensor_info(
        graph: trtxpy_graph, direction: trtxpy_direction, index: usize, info: *mut trtxpy_tensor_info
    ) -> trtxpy_status;
    fn trtxpy_graph_prepare(
        graph: trtxpy_graph, inputs: *const trtxpy_named_shape, input_count: usize
    ) -> trtxpy_status;
    fn trtxpy_graph_output_shapes(
        graph: trtxpy_graph, inputs: *const trtxpy_named_shape, input_count: usize, shapes: *mut trtxpy_shape,
        room: usize
    ) -> trtxpy_status;
    fn trtxpy_graph_get_statistics(graph: trtxpy_graph, statistics: *mut trtxpy_graph_statistics) -> trtxpy_status;

    fn trtxpy_tensor_create(
        context: trtxpy_context, desc: *const trtxpy_tensor_desc, tensor: *mut trtxpy_tensor
    ) -> trtxpy_status;
    fn trtxpy_tensor_destroy(tensor: trtxpy_tensor) -> trtxpy_status;
    fn trtxpy_tensor_resize(tensor: trtxpy_tensor, shape: *const trtxpy_shape) -> trtxpy_status;
    fn trtxpy_tensor_describe(tensor: trtxpy_tensor, desc: *mut trtxpy_tensor_desc) -> trtxpy_status;
    fn trtxpy_tensor_bytes(tensor: trtxpy_tensor, bytes: *mut usize) -> trtxpy_status;
    fn trtxpy_tensor_write(tensor: trtxpy_tensor, data: *const c_void, bytes: usize) -> trtxpy_status;
    fn trtxpy_tensor_read(tensor: trtxpy_tensor, data: *mut c_void, bytes: usize) -> trtxpy_status;
    fn trtxpy_tensor_data(tensor: trtxpy_tensor, data: *mut *mut c_void) -> trtxpy_status;
    fn trtxpy_graph_create_tensors(
        graph: trtxpy_graph, shapes: *const trtxpy_named_shape, shape_count: usize, inputs: *mut trtxpy_tensor,
        input_count: usize, outputs: *mut trtxpy_tensor, output_count: usize
    ) -> trtxpy_status;
    fn trtxpy_tensor_from_dlpack(
        context: trtxpy_context, managed: *mut DLManagedTensor, tensor: *mut trtxpy_tensor
    ) -> trtxpy_status;
    fn trtxpy_tensor_to_dlpack(tensor: trtxpy_tensor, managed: *mut *mut DLManagedTensor) -> trtxpy_status;

    fn trtxpy_dispatch(
        graph: trtxpy_graph, inputs: *const trtxpy_binding, input_count: usize, outputs: *const trtxpy_binding,
        output_count: usize, options: *const trtxpy_dispatch_options
    ) -> trtxpy_status;
    fn trtxpy_submit(
        graph: trtxpy_graph, inputs: *const trtxpy_binding, input_count: usize, outputs: *const trtxpy_binding,
        output_count: usize, options: *const trtxpy_submit_options, request: *mut trtxpy_request
    ) -> trtxpy_status;
    fn trtxpy_request_cancel(request: trtxpy_request) -> trtxpy_status;
    fn trtxpy_request_wait(request: trtxpy_request, timeout_ns: u64, outcome: *mut trtxpy_status) -> trtxpy_status;
    fn trtxpy_request_destroy(request: trtxpy_request) -> trtxpy_status;

    fn trtxpy_queue_create(context: trtxpy_context, queue: *mut trtxpy_queue) -> trtxpy_status;
    fn trtxpy_queue_destroy(queue: trtxpy_queue) -> trtxpy_status;
    fn trtxpy_queue_fd(queue: trtxpy_queue, fd: *mut c_int) -> trtxpy_status;
    fn trtxpy_queue_take(
        queue: trtxpy_queue, completions: *mut trtxpy_completion, room: usize, taken: *mut usize
    ) -> trtxpy_status;

    fn trtxpy_run(
        context: trtxpy_context, model: *const c_void, model_bytes: usize, weights: *const c_void,
        weights_bytes: usize, inputs: *const trtxpy_array, input_count: usize,
        options: *const trtxpy_graph_options, results: *mut trtxpy_results
    ) -> trtxpy_status;
    fn trtxpy_run_zeroed(
        context: trtxpy_context, model: *const c_void, model_bytes: usize, weights: *const c_void,
        weights_bytes: usize, options: *const trtxpy_graph_options, results: *mut trtxpy_results
    ) -> trtxpy_status;
    fn trtxpy_results_count(results: trtxpy_results, count: *mut usize) -> trtxpy_status;
    fn trtxpy_results_get(results: trtxpy_results, index: usize, array: *mut trtxpy_array) -> trtxpy_status;
    fn trtxpy_results_destroy(results: trtxpy_results) -> trtxpy_status;
}
