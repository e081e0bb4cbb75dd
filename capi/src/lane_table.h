/* The lanes as a table of functions, for code that lives in another shared object: libtrtxpy uses those of trtx_py._native, so
 * that a process has one copy of them, and one watcher. */
#ifndef TRTX_LANE_TABLE_H
#define TRTX_LANE_TABLE_H

#include "lane.h"

#ifdef __cplusplus
extern "C" {
#endif

/* Name of the capsule that holds one, and what both sides must agree on. Grows at its end only; the version moves when a
 * function changes what it does. */
#define TRTX_LANE_TABLE_NAME "trtx_py.lane_table"
enum { TRTX_LANE_TABLE_VERSION = 1 };

/* Each as trtx_lane_... or trtx_hub_... in lane.h. */
typedef struct trtx_lane_table {
    size_t struct_size;
    unsigned version;
    CUresult (*acquire_among)(trtx_lane *lane, const uint64_t *slots, size_t words, bool look, size_t *slot);
    CUresult (*release)(trtx_lane *lane, size_t slot);
    CUresult (*submit)(trtx_lane *lane, size_t slot, CUgraphExec exec, uint64_t token, trtx_hub *hub);
    trtx_slot_state (*wait)(trtx_lane *lane, size_t slot, uint64_t spin_ns, uint64_t timeout_ns, trtx_completion *completion);
    CUresult (*arm)(trtx_lane *lane, size_t slot);
    CUresult (*hub_create)(trtx_hub **hub, int *fd);
    void (*hub_release)(trtx_hub *hub);
    size_t (*hub_take)(trtx_hub *hub, trtx_completion *completions, size_t room);
} trtx_lane_table;

const trtx_lane_table *trtx_lane_table_get(void);

#ifdef __cplusplus
}
#endif
#endif
