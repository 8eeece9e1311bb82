// x + scale * proj(attention(qkv(norm(x)))), block by block: what lies between the matmuls stays in cache.
// No include guard: included once per target, after the kernels of its parts, inside that target's namespace.

// Blocks [begin, end).
template <class Op>
void attention_layer(const AttentionLayer& p, int64_t begin, int64_t end) {
  using T = typename Op::Element;
  const int64_t tokens = p.heads.tokens, features = p.qkv.in, packed_features = p.qkv.out;
  const Tiles tiles(tokens);
  const int64_t a_floats = tiles.count * units_of<Op>(features) * kRows;
  Scratch scratch(round_up(features, kPair) + a_floats);
  float* const row = scratch.take(round_up(features, kPair));
  float* const a = scratch.take(a_floats);
  // In training every block's qkv and attention are wanted; otherwise one block's memory serves all.
  const bool training = p.qkv_out != nullptr;
  const std::unique_ptr<T[]> memory(new T[training ? 0 : tokens * (packed_features + features)]);
  T* const qkv = training ? static_cast<T*>(p.qkv_out) : memory.get();
  T* const attended = training ? static_cast<T*>(p.attended) : memory.get() + tokens * packed_features;
  const BlockAttention attention = p.heads.attention(qkv, attended, sizeof(T), p.scale, p.lse);
  const int64_t strips = p.heads.heads * strips_per_head(tokens);

  for (int64_t block = begin; block < end; ++block) {
    const int64_t kept = training ? block : 0, token = kept * tokens;
    const T* x = static_cast<const T*>(p.x) + block * tokens * p.x_stride;
    T* out = static_cast<T*>(p.out) + block * tokens * features;
    pack_tiles<Op>(tiles, x, p.x_stride, features, p.norm, row, a);
    multiply_tiles<Op>(tiles, a, p.qkv, [&](int64_t tile, int64_t column, const float* c) {
      store_rows<T>(c, tiles.size(tile), column, p.qkv, {}, qkv + (token + tiles.first(tile)) * packed_features,
                    packed_features);
    });
    attend<Op>(attention, kept * strips, (kept + 1) * strips);
    pack_tiles<Op>(tiles, attended + token * features, features, features, {}, row, a);
    multiply_tiles<Op>(tiles, a, p.proj, [&](int64_t tile, int64_t column, const float* c) {
      const int64_t at = tiles.first(tile);
      store_rows<T>(c, tiles.size(tile), column, p.proj, {x + at * p.x_stride, p.x_stride, p.branch_scale},
                    out + at * features, features);
    });
  }
}
