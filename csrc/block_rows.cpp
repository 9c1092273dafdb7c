#include "block_rows.h"

#include "cpu/dispatch.h"
#include "limits.h"
#include "memory.h"

namespace cnnlstm_fast {

const int64_t kItemFloats = limit("ITEM_FLOATS", 96 * 1024, 1);
const int64_t kPositionsPerSum = limit("POSITIONS_PER_SUM", 2048, 1);

int64_t rows_per_item(const Block& b, int64_t scratch_of_row, int64_t scratch_of_two) {
  const int64_t per_row = std::max<int64_t>(1, scratch_of_two - scratch_of_row);
  int64_t rows = std::max<int64_t>(1, 1 + (kItemFloats - scratch_of_row) / per_row);
  const int64_t wanted = wanted_items();
  if (b.n < wanted) rows = std::min(rows, ceil_div(b.out_h, ceil_div(wanted, b.n)));
  rows = std::min(rows, b.out_h);
  return ceil_div(b.out_h, ceil_div(b.out_h, rows));
}

void run_epilogue(const Block& b, const void* map, int64_t first, int64_t images, const float* scale,
                  const float* shift, const Outputs& out) {
  const KernelTable& k = kernels();
  const int64_t rows = rows_per_item(b, k.epilogue_scratch(b, 1), k.epilogue_scratch(b, 2));
  const int64_t bands = ceil_div(b.out_h, rows), scratch = k.epilogue_scratch(b, rows);
  const int64_t image_bytes = b.oh * b.ow * b.co * (b.dtype == kFloat32 ? 4 : 2);
  const char* data = static_cast<const char*>(map);
  for_each_item(images * bands, [&](int64_t item) {
    const int64_t i = item / bands, row0 = item % bands * rows;
    k.epilogue(b, {data + i * image_bytes, b.ow * b.co, b.co, b.dtype, scale, shift}, out, first + i, row0,
               std::min(b.out_h, row0 + rows), thread_scratch(scratch));
  });
}

}  // namespace cnnlstm_fast
