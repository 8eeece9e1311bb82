// The schemas of the operations that the extension computes, for programs that load it without Python: an AOTInductor
// package calls operations by name. nest_fast/ops defines the same, and checks that they are, where Python came first.

#include <torch/csrc/stable/library.h>

STABLE_TORCH_LIBRARY_FRAGMENT(nest_fast, m) {
  m.def("cpp_isa() -> str");
  m.def("cpp_set_isa(str isa) -> ()");

  m.def("blockify(Tensor x, SymInt[2] block_size, Tensor? pos_embed) -> Tensor");
  m.def("unblockify(Tensor x, SymInt[2] grid_size, SymInt[2] block_size, Tensor? pos_embed) -> Tensor");
  m.def("patchify(Tensor x, SymInt[2] patch_size, SymInt[2] block_size) -> Tensor");
  m.def("unpatchify(Tensor x, SymInt[2] patch_size, SymInt[2] grid_size, SymInt[2] block_size) -> Tensor");

  m.def("block_attention_cpp_fwd(Tensor q, Tensor k, Tensor v, float scale) -> (Tensor out, Tensor lse)");
  m.def("block_attention_cpp_bwd(Tensor dout, Tensor q, Tensor k, Tensor v, Tensor out, Tensor lse, float scale)"
        " -> (Tensor dq, Tensor dk, Tensor dv)");

  m.def("block_aggregate_cpp_fwd(Tensor x, Tensor conv_weight, Tensor? conv_bias, Tensor norm_weight,"
        " Tensor norm_bias, Tensor? pos_embed, SymInt[2] grid_size, SymInt[2] block_size, SymInt[2] out_block_size,"
        " float eps, bool same, bool training) -> (Tensor out, Tensor y, Tensor mean, Tensor rstd, Tensor argmax)");
  m.def("block_aggregate_cpp_dx(Tensor dy, Tensor conv_weight, SymInt[2] grid_size, SymInt[2] block_size) -> Tensor");
  m.def("norm_pool_cpp_fwd(Tensor y, Tensor? conv_bias, Tensor norm_weight, Tensor norm_bias, Tensor? pos_embed,"
        " SymInt[2] out_block_size, float eps, bool same, bool training)"
        " -> (Tensor out, Tensor mean, Tensor rstd, Tensor argmax)");
  m.def("norm_pool_cpp_bwd(Tensor dout, Tensor y, Tensor? conv_bias, Tensor norm_weight, Tensor mean, Tensor rstd,"
        " Tensor argmax, SymInt[2] out_block_size, bool same) -> (Tensor dy, Tensor dparams)");

  m.def("attention_layer_cpp(Tensor x, Tensor norm_weight, Tensor norm_bias, float eps, Tensor qkv_weight,"
        " Tensor? qkv_bias, Tensor proj_weight, Tensor? proj_bias, SymInt tokens, int heads, int kv_heads, float scale,"
        " float branch_scale, bool training) -> (Tensor out, Tensor qkv, Tensor attended, Tensor lse)");
  m.def("attention_layer_cpp_bwd(Tensor dout, Tensor x, Tensor qkv, Tensor attended, Tensor lse, Tensor qkv_weight,"
        " Tensor proj_weight, SymInt tokens, int heads, int kv_heads, float scale)"
        " -> (Tensor dx, Tensor dqkv_weight, Tensor dqkv_bias, Tensor dproj_weight, Tensor dproj_bias)");

  m.def("mlp_layer_cpp(Tensor x, Tensor norm_weight, Tensor norm_bias, float eps, Tensor fc1_weight, Tensor? fc1_bias,"
        " str activation, Tensor fc2_weight, Tensor? fc2_bias, float branch_scale, bool training)"
        " -> (Tensor out, Tensor hidden)");
  m.def("mlp_layer_cpp_bwd(Tensor dout, Tensor x, Tensor hidden, Tensor fc1_weight, str activation, Tensor fc2_weight)"
        " -> (Tensor dx, Tensor dfc1_weight, Tensor dfc1_bias, Tensor dfc2_weight, Tensor dfc2_bias)");
}
