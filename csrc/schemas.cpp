// The schemas of the operations that a forward pass calls, for programs that load the extension without Python: an
// AOTInductor package calls them by name. nest_fast/ops defines the same and compares the two when it is imported.

#include <torch/csrc/stable/library.h>

STABLE_TORCH_LIBRARY_FRAGMENT(nest_fast, m) {
  m.def("blockify(Tensor x, SymInt[2] block_size, Tensor? pos_embed) -> Tensor");
  m.def("unblockify(Tensor x, SymInt[2] grid_size, SymInt[2] block_size, Tensor? pos_embed) -> Tensor");
  m.def("patchify(Tensor x, SymInt[2] patch_size, SymInt[2] block_size) -> Tensor");
  m.def("block_attention_cpp_fwd(Tensor q, Tensor k, Tensor v, Tensor? rel_h, Tensor? rel_w, Tensor? bias,"
        " Tensor? mask, Tensor? pad_k, Tensor? pad_v, float scale, SymInt[] windows) -> (Tensor out, Tensor lse)");
  m.def("block_aggregate_cpp_fwd(Tensor x, Tensor conv_weight, Tensor? conv_bias, Tensor norm_weight,"
        " Tensor norm_bias, Tensor? pos_embed, SymInt[2] grid_size, SymInt[2] block_size, SymInt[2] out_block_size,"
        " float eps, bool same, bool training, Tensor? conv_packed=None)"
        " -> (Tensor out, Tensor y, Tensor mean, Tensor rstd, Tensor argmax)");
  m.def("norm_pool_cpp_fwd(Tensor y, Tensor? conv_bias, Tensor norm_weight, Tensor norm_bias, Tensor? pos_embed,"
        " SymInt[2] out_block_size, float eps, bool same, bool training)"
        " -> (Tensor out, Tensor mean, Tensor rstd, Tensor argmax)");
  m.def("attention_layer_cpp(Tensor x, Tensor? norm_weight, Tensor? norm_bias, float eps, Tensor qkv_weight,"
        " Tensor? qkv_bias, Tensor proj_weight, Tensor? proj_bias, Tensor? bias, Tensor? mask, Tensor? scales,"
        " SymInt[] windows, SymInt tokens, int heads, int kv_heads, float scale, float branch_scale, bool training,"
        " Tensor? qkv_packed=None, Tensor? proj_packed=None) -> (Tensor out, Tensor qkv, Tensor attended, Tensor lse)");
  m.def("mlp_layer_cpp(Tensor x, Tensor? norm_weight, Tensor? norm_bias, float eps, Tensor fc1_weight,"
        " Tensor? fc1_bias, str activation, Tensor fc2_weight, Tensor? fc2_bias, float branch_scale, bool training,"
        " Tensor? fc1_packed=None, Tensor? fc2_packed=None) -> (Tensor out, Tensor hidden)");
}
