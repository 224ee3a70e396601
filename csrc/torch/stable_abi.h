// The functions of PyTorch's stable C interface that this library needs, declared here so that
// building needs no torch at all. All are exported by libtorch_cpu.so of torch >= 2.10 and covered
// by PyTorch's stable-ABI promise (the weak ones say otherwise). tests/test_abi.py compiles these
// declarations beside the headers of the installed torch: a drift is a build error there.
#pragma once

#include <stddef.h>
#include <stdint.h>

extern "C" {
struct AtenTensorOpaque;
struct StringOpaque;
struct DeviceGuardOpaque;
class TorchLibraryOpaque;

int32_t aoti_torch_get_data_ptr(AtenTensorOpaque*, void**);
int32_t aoti_torch_get_dim(AtenTensorOpaque*, int64_t*);
int32_t aoti_torch_get_numel(AtenTensorOpaque*, int64_t*);
int32_t aoti_torch_get_sizes(AtenTensorOpaque*, int64_t**);
int32_t aoti_torch_get_strides(AtenTensorOpaque*, int64_t**);
int32_t aoti_torch_get_dtype(AtenTensorOpaque*, int32_t*);
int32_t aoti_torch_get_device_type(AtenTensorOpaque*, int32_t*);
int32_t aoti_torch_get_device_index(AtenTensorOpaque*, int32_t*);
int32_t aoti_torch_delete_tensor_object(AtenTensorOpaque*);
int32_t aoti_torch_empty_strided(int64_t, const int64_t*, const int64_t*, int32_t, int32_t, int32_t,
                                 AtenTensorOpaque**);
int32_t aoti_torch_copy_(AtenTensorOpaque*, AtenTensorOpaque*, int32_t);
int32_t aoti_torch_dtype_float32();
int32_t aoti_torch_dtype_float16();
int32_t aoti_torch_dtype_bfloat16();
int32_t aoti_torch_dtype_float8_e4m3fn();
int32_t aoti_torch_dtype_float8_e5m2();
int32_t aoti_torch_dtype_int8();
int32_t aoti_torch_dtype_int32();
int32_t aoti_torch_dtype_int64();
int32_t aoti_torch_dtype_float64();
int32_t aoti_torch_dtype_int16();
int32_t aoti_torch_dtype_uint8();
int32_t aoti_torch_dtype_bool();
int32_t aoti_torch_dtype_complex64();
int32_t aoti_torch_dtype_complex128();
int32_t aoti_torch_device_type_cpu();
int32_t aoti_torch_device_type_cuda();
int32_t aoti_torch_create_device_guard(int32_t, DeviceGuardOpaque**);
int32_t aoti_torch_delete_device_guard(DeviceGuardOpaque*);
int32_t aoti_torch_library_init_def(const char*, const char*, uint32_t, TorchLibraryOpaque**);
int32_t aoti_torch_library_init_fragment(const char*, const char*, uint32_t, TorchLibraryOpaque**);
int32_t aoti_torch_library_init_impl(const char*, const char*, const char*, uint32_t,
                                     TorchLibraryOpaque**);
int32_t aoti_torch_library_def(TorchLibraryOpaque*, const char*);
int32_t torch_library_impl(TorchLibraryOpaque*, const char*,
                           void (*)(uint64_t*, uint64_t, uint64_t), uint64_t);
int32_t torch_parallel_for(int64_t, int64_t, int64_t, void (*)(int64_t, int64_t, void*), void*);
int32_t torch_get_num_threads(uint32_t*);
int32_t torch_string_length(StringOpaque*, size_t*);
int32_t torch_string_c_str(StringOpaque*, const char**);
int32_t torch_delete_string(StringOpaque*);
int32_t torch_new_string_handle(const char*, size_t, StringOpaque**);

// libtorch_cuda.so only: null on a CPU-only torch.
__attribute__((weak)) int32_t aoti_torch_get_current_cuda_stream(int32_t, void**);
// torch >= 2.13 only: the text of the exception that a call of this interface swallowed.
__attribute__((weak)) const char* torch_exception_get_what_without_backtrace();
}
