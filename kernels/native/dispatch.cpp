// The ops mm_sq_norm and product_sq_norm on CPUs without Python: ten microseconds less a call.
//
//     dispatcher -> mm_sq_norm here -> the kernel of the dtype    or, where there is none, the op _mm_sq_norm in Python
//
// Only functions of PyTorch's C interface for extensions are called, which does not change between versions. A tensor
// that comes in on the stack is ours to delete, one that is left there is the caller's.

#include <cstdint>
#include <stdexcept>

extern "C" {
typedef struct AtenTensorOpaque* Handle;
typedef struct TorchLibraryOpaque* Library;
int32_t aoti_torch_get_data_ptr(Handle, void**);
int32_t aoti_torch_get_dim(Handle, int64_t*);
int32_t aoti_torch_get_sizes(Handle, int64_t**);
int32_t aoti_torch_get_strides(Handle, int64_t**);
int32_t aoti_torch_get_dtype(Handle, int32_t*);
int32_t aoti_torch_get_device_type(Handle, int32_t*);
int32_t aoti_torch_empty_strided(int64_t, const int64_t*, const int64_t*, int32_t, int32_t, int32_t, Handle*);
int32_t aoti_torch_delete_tensor_object(Handle);
int32_t aoti_torch_call_dispatcher(const char*, const char*, uint64_t*);
int32_t aoti_torch_dtype_float32();
int32_t aoti_torch_dtype_float64();
int32_t aoti_torch_dtype_bfloat16();
int32_t aoti_torch_dtype_float16();
int32_t aoti_torch_library_init_impl(const char*, const char*, const char*, uint32_t, Library*);
int32_t aoti_torch_library_impl(Library, const char*, void (*)(uint64_t*, uint64_t, uint64_t));
int32_t torch_get_num_threads(uint32_t*);
}

namespace {

using Kernel = void (*)(int64_t*, const void*, const void*, void*, void*, int);
constexpr int DTYPES = 64, DIMS = 4;
Kernel kernels[DTYPES];

void check(int32_t error) {
    if (error) throw std::runtime_error("gnsfx: PyTorch refused a call of the kernel; what it says is above");
}

struct Factor {
    Handle tensor;
    int64_t *sizes, *strides, dims;
    int32_t dtype, device;
    void* data;

    explicit Factor(Handle tensor) : tensor(tensor) {
        check(aoti_torch_get_dim(tensor, &dims));
        check(aoti_torch_get_sizes(tensor, &sizes));
        check(aoti_torch_get_strides(tensor, &strides));
        check(aoti_torch_get_dtype(tensor, &dtype));
        check(aoti_torch_get_device_type(tensor, &device));
        check(aoti_torch_get_data_ptr(tensor, &data));
    }
};

// x [B, E, T, I] and g [B, E, T, O], with nothing empty, of a dtype that has a kernel.
bool fit(const Factor& x, const Factor& g) {
    if (x.dims != DIMS || g.dims != DIMS || x.dtype != g.dtype || x.device != g.device) return false;
    if (x.dtype < 0 || x.dtype >= DTYPES || !kernels[x.dtype] || !g.sizes[3]) return false;
    for (int d = 0; d < DIMS; d++)
        if (!x.sizes[d] || (d < 3 && x.sizes[d] != g.sizes[d])) return false;
    return true;
}

Handle empty(int64_t dims, const int64_t* sizes, const int64_t* strides, int32_t dtype, int32_t device) {
    Handle result;
    check(aoti_torch_empty_strided(dims, sizes, strides, dtype, device, 0, &result));
    return result;
}

void run(uint64_t* stack, bool summed, const char* otherwise) {
    const Factor x(reinterpret_cast<Handle>(stack[0])), g(reinterpret_cast<Handle>(stack[1]));
    if (!fit(x, g)) return check(aoti_torch_call_dispatcher(otherwise, "", stack));
    const int64_t B = x.sizes[0], E = x.sizes[1], T = x.sizes[2], I = x.sizes[3], O = g.sizes[3];
    int64_t shape[21] = {B, E, T, I, O}; // what follows the strides is zero: no rows are added
    for (int d = 0; d < DIMS; d++) shape[5 + d] = x.strides[d], shape[9 + d] = g.strides[d];
    const int64_t sizes[] = {E, I, O}, strides[] = {I * O, O, 1}, one = 1;
    const int32_t dtype = x.dtype == aoti_torch_dtype_float64() ? x.dtype : aoti_torch_dtype_float32();
    Handle grad = summed ? empty(3, sizes, strides, x.dtype, x.device) : nullptr;
    Handle sq_norms = empty(1, &B, &one, dtype, x.device);
    void *out = nullptr, *norms;
    uint32_t threads;
    if (summed) check(aoti_torch_get_data_ptr(grad, &out));
    check(aoti_torch_get_data_ptr(sq_norms, &norms));
    check(torch_get_num_threads(&threads));
    kernels[x.dtype](shape, x.data, g.data, out, norms, int(threads));
    check(aoti_torch_delete_tensor_object(x.tensor));
    check(aoti_torch_delete_tensor_object(g.tensor));
    if (summed) *stack++ = reinterpret_cast<uint64_t>(grad);
    *stack = reinterpret_cast<uint64_t>(sq_norms);
}

void mm_sq_norm(uint64_t* stack, uint64_t, uint64_t) { run(stack, true, "gnsfx::_mm_sq_norm"); }
void product_sq_norm(uint64_t* stack, uint64_t, uint64_t) { run(stack, false, "gnsfx::_product_sq_norm"); }

} // namespace

// Put the ops of this file before those in Python; 0 if PyTorch let us.
extern "C" int take_over() {
    Library library;
    return aoti_torch_library_init_impl("gnsfx", "CPU", __FILE__, __LINE__, &library) ||
           aoti_torch_library_impl(library, "mm_sq_norm", mm_sq_norm) ||
           aoti_torch_library_impl(library, "product_sq_norm", product_sq_norm);
}

// Take the kernel for inputs of one dtype: 0 float32, 1 float64, 2 bfloat16, 3 float16.
extern "C" void use(int which, Kernel kernel) {
    const int32_t dtypes[] = {aoti_torch_dtype_float32(), aoti_torch_dtype_float64(), aoti_torch_dtype_bfloat16(),
                              aoti_torch_dtype_float16()};
    if (dtypes[which] >= 0 && dtypes[which] < DTYPES) kernels[dtypes[which]] = kernel;
}
