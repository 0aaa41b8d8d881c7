/* Rows on the threads of a team that is there already, without the interpreter: see threads.py. */
#ifndef LEANMILL_TEAM_H
#define LEANMILL_TEAM_H

#include <stdint.h>

typedef struct {
    void (*parallel)(void (*)(void *), void *, unsigned, unsigned);
    int (*number)(void); /* of a member within the team */
    int (*size)(void);
} thread_team;

typedef struct {
    void (*rows)(const void *work, int64_t first, int64_t last);
    const void *work;
    const thread_team *team;
    int64_t num_rows, multiple;
} team_task;

static void team_member(void *data) {
    const team_task *task = data;
    int64_t number = task->team->number(), size = task->team->size();
    int64_t blocks = (task->num_rows + task->multiple - 1) / task->multiple;
    int64_t first = blocks * number / size * task->multiple, last = blocks * (number + 1) / size * task->multiple;
    task->rows(task->work, first, last < task->num_rows ? last : task->num_rows);
}

/* Calls `rows(work, first, last)` so that the calls cover rows 0 to `num_rows` once; shares start at multiples of
 * `multiple`. Without a team, or with one thread, on the caller's thread. */
static inline void on_team(const thread_team *team, int num_threads, void (*rows)(const void *, int64_t, int64_t),
                    const void *work, int64_t num_rows, int64_t multiple) {
    if (!team || num_threads <= 1) {
        rows(work, 0, num_rows);
        return;
    }
    team_task task = {rows, work, team, num_rows, multiple};
    team->parallel(team_member, &task, (unsigned)num_threads, 0);
}

#endif
