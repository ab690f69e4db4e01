// The launchers of InfoNCE, with C linkage and without torch.
#include "../../csrc/info_nce/cuda_embeddings.cuh"
#include "../../csrc/info_nce/cuda.cuh"
#include "../../csrc/info_nce/cuda_rows.cuh"

using namespace tlk;
using namespace tlk::contrastive;

extern "C" int tlk_info_nce_statistics(const InfoNceTiles* tiles, int way, cudaStream_t stream) {
  return int(info_nce_statistics(*tiles, Way(way), stream));
}
extern "C" int tlk_info_nce_gradient(const InfoNceTiles* tiles, int way, cudaStream_t stream) {
  return int(info_nce_gradient(*tiles, Way(way), stream));
}
extern "C" int tlk_info_nce_start(double* state, int directions, int64_t rows, cudaStream_t stream) {
  return int(info_nce_start(state, directions, rows, stream));
}

// `wide`: float64, else float32.
extern "C" int tlk_info_nce_fold(const Fold* fold, bool wide, cudaStream_t stream) {
  return int(wide ? info_nce_fold<double>(*fold, stream) : info_nce_fold<float>(*fold, stream));
}
extern "C" int tlk_info_nce_losses(const InfoNceRows* rows, bool wide, cudaStream_t stream) {
  return int(wide ? info_nce_losses<double>(*rows, stream) : info_nce_losses<float>(*rows, stream));
}
extern "C" int tlk_info_nce_slopes(const InfoNceRows* rows, bool wide, cudaStream_t stream) {
  return int(wide ? info_nce_slopes<double>(*rows, stream) : info_nce_slopes<float>(*rows, stream));
}

// `arguments` are those of launcher `step`.
template <class T>
static cudaError_t embeddings(const void* arguments, int step, cudaStream_t stream) {
  switch (step) {
    case 0:
      return scale_rows<T>(*static_cast<const ScaledRows*>(arguments), stream);
    case 1:
      return finish_rows<T>(*static_cast<const FinishedRows*>(arguments), stream);
    case 2:
      return per_query_similarities<T>(*static_cast<const PerQueryNegatives*>(arguments), stream);
    case 3:
      return per_query_gradients<T>(*static_cast<const PerQueryNegatives*>(arguments), stream);
  }
  return cudaErrorInvalidValue;
}
extern "C" int tlk_info_nce_embeddings(const void* arguments, int step, int scalar, cudaStream_t stream) {
  switch (Scalar(scalar)) {
    case Scalar::f64:
      return int(embeddings<double>(arguments, step, stream));
    case Scalar::f32:
      return int(embeddings<float>(arguments, step, stream));
    case Scalar::bf16:
      return int(embeddings<bf16>(arguments, step, stream));
    case Scalar::f16:
      return int(embeddings<f16>(arguments, step, stream));
  }
  return int(cudaErrorInvalidValue);
}
