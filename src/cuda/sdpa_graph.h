/* sdpa_graph.h: cuDNN's library, and one plan of attention in it. For sdpa.c alone; empty where
 * cuDNN's headers (9.8 or newer) are not. */
#ifndef KI_SDPA_GRAPH_H
#define KI_SDPA_GRAPH_H
#include "base.h"

#if __has_include(<cudnn_graph.h>)
#include <cudnn_graph.h>
#endif

/* 9.8 is the first whose plans can be made for a device that is not there. */
#if defined(CUDNN_VERSION) && CUDNN_VERSION >= 90800
#define KI_HAS_CUDNN 1

typedef struct ki_cudnn { /* its calls; cudnn_graph.h says what they do */
    size_t version;       /* 91900: 9.19.0 */
    size_t (*get_version)(void);
    const char *(*error_string)(cudnnStatus_t);
    void (*last_error)(char *text, size_t max_bytes);
    cudnnStatus_t (*create)(cudnnHandle_t *);
    cudnnStatus_t (*destroy)(cudnnHandle_t);
    cudnnStatus_t (*set_stream)(cudnnHandle_t, cudaStream_t);
    cudnnStatus_t (*make)(cudnnBackendDescriptorType_t, cudnnBackendDescriptor_t *);
    cudnnStatus_t (*drop)(cudnnBackendDescriptor_t);
    cudnnStatus_t (*finalize)(cudnnBackendDescriptor_t);
    cudnnStatus_t (*set)(cudnnBackendDescriptor_t, cudnnBackendAttributeName_t,
                         cudnnBackendAttributeType_t, int64_t n, const void *);
    cudnnStatus_t (*get)(cudnnBackendDescriptor_t, cudnnBackendAttributeName_t,
                         cudnnBackendAttributeType_t, int64_t n, int64_t *n_found, void *);
    cudnnStatus_t (*execute)(cudnnHandle_t, cudnnBackendDescriptor_t plan,
                             cudnnBackendDescriptor_t pack);
} ki_cudnn;

/* What a plan's tensors are called when it is run. */
typedef enum ki_sdpa_uid {
    KI_SDPA_Q = 1,
    KI_SDPA_K,
    KI_SDPA_V,
    KI_SDPA_OUT,
    KI_SDPA_SCALE, /* host memory, f32, as all down to the lengths */
    KI_SDPA_CAUSAL_LOW,
    KI_SDPA_WINDOW_LOW, /* with a window: this and the next */
    KI_SDPA_WINDOW,
    KI_SDPA_LENGTH_LOW, /* unless exact: this and all that follow */
    KI_SDPA_Q_LENGTH,
    KI_SDPA_K_LENGTH,
    KI_SDPA_Q_OFFSETS,
    KI_SDPA_K_OFFSETS,
    KI_SDPA_V_OFFSETS,
    KI_SDPA_OUT_OFFSETS,
    KI_SDPA_UIDS
} ki_sdpa_uid;

typedef struct ki_sdpa_shape {
    uint32_t n_heads, n_kv_heads, head_dim, window;
    uint32_t n_rows; /* most, or with exact all */
    bool exact;
} ki_sdpa_shape;

enum { KI_SDPA_MAX_DESCRIPTORS = 160 }; /* a plan with all masks has 120 */

typedef struct ki_sdpa_plan {
    ki_sdpa_shape shape;
    cudnnBackendDescriptor_t plan;
    uint64_t workspace_bytes;
    cudnnBackendDescriptor_t all[KI_SDPA_MAX_DESCRIPTORS]; /* what the plan was made of, and it */
    uint32_t n_all;
} ki_sdpa_plan;

/* For the handle's device, or (handle NULL) for one described by a finalized descriptor. At most
 * workspace_bytes of workspace. UNSUPPORTED where cuDNN has no kernel; out is then empty. */
kivi_status ki_sdpa_plan_make(ki_sdpa_plan *out, const ki_cudnn *cudnn, cudnnHandle_t handle,
                              cudnnBackendDescriptor_t device, const ki_sdpa_shape *shape,
                              uint64_t workspace_bytes, kivi_error *err);
void ki_sdpa_plan_drop(ki_sdpa_plan *plan, const ki_cudnn *cudnn);
/* The smallest number, as cuDNN's masks of this version take it. */
float ki_sdpa_lowest(const ki_cudnn *cudnn);

#endif
#endif
