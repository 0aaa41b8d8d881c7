/* Includes BODY, a file in the folder of the source, once for each element type: with T, LOAD and STORE of the
 * type, and NAME(function), which appends the type's name. */
#define T float
#define LOAD load_fp32
#define STORE store_fp32
#define NAME(f) f##_fp32
#define IS_BF16 0
#include BODY
#undef T
#undef LOAD
#undef STORE
#undef NAME
#undef IS_BF16
#define T bf16_t
#define LOAD load_bf16
#define STORE store_bf16
#define NAME(f) f##_bf16
#define IS_BF16 1
#include BODY
#undef T
#undef LOAD
#undef STORE
#undef NAME
#undef IS_BF16
#define T fp16_t
#define LOAD load_fp16
#define STORE store_fp16
#define NAME(f) f##_fp16
#define IS_BF16 0
#include BODY
#undef T
#undef LOAD
#undef STORE
#undef NAME
#undef IS_BF16
