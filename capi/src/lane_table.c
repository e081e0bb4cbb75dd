#include "lane_table.h"

const trtx_lane_table *trtx_lane_table_get(void) {
    static const trtx_lane_table table = {
        .struct_size = sizeof table,
        .version = TRTX_LANE_TABLE_VERSION,
        .acquire_among = trtx_lane_acquire_among,
        .release = trtx_lane_release,
        .submit = trtx_lane_submit,
        .wait = trtx_lane_wait,
        .arm = trtx_lane_arm,
        .hub_create = trtx_hub_create,
        .hub_release = trtx_hub_release,
        .hub_take = trtx_hub_take,
    };
    return &table;
}
