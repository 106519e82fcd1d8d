/* fake_driver.c: a libcuda.so.1 for check-sdpa: there is no device, and any kernel can be loaded.
 * cuDNN makes plans for a device that is described to it, and needs a driver all the same. */

enum { DONE = 0, NO_DEVICE = 100 };

#define ABSENT(name)                                                                               \
    int name(void);                                                                                \
    int name(void) { return NO_DEVICE; }
#define PRESENT(name)                                                                              \
    int name(void **out);                                                                          \
    int name(void **out) {                                                                         \
        *out = (void *)16;                                                                         \
        return DONE;                                                                               \
    }

PRESENT(cuLibraryLoadData)
PRESENT(cuLibraryGetKernel)
PRESENT(cuKernelGetFunction)
PRESENT(cuModuleGetFunction)
PRESENT(cuModuleLoadData)

ABSENT(cuInit)
ABSENT(cuCtxGetCurrent)
ABSENT(cuCtxGetLimit)
ABSENT(cuCtxPopCurrent)
ABSENT(cuCtxPushCurrent)
ABSENT(cuDeviceGet)
ABSENT(cuDeviceGetCount)
ABSENT(cuDriverGetVersion)
ABSENT(cuFuncSetAttribute)
ABSENT(cuGetErrorName)
ABSENT(cuGetErrorString)
ABSENT(cuKernelGetAttribute)
ABSENT(cuKernelSetAttribute)
ABSENT(cuLaunchCooperativeKernel)
ABSENT(cuLaunchKernel)
ABSENT(cuLaunchKernelEx)
ABSENT(cuLibraryLoadFromFile)
ABSENT(cuLibraryUnload)
ABSENT(cuLinkAddData)
ABSENT(cuLinkComplete)
ABSENT(cuLinkCreate)
ABSENT(cuLinkDestroy)
ABSENT(cuModuleUnload)
ABSENT(cuOccupancyMaxPotentialClusterSize)
ABSENT(cuStreamGetCtx)
ABSENT(cuTensorMapEncodeIm2col)
ABSENT(cuTensorMapEncodeTiled)
