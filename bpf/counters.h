/* SPDX-License-Identifier: GPL-2.0 */
/* Counters that each CPU keeps in addition to its records. */
#ifndef CWNDTRACE_COUNTERS_H
#define CWNDTRACE_COUNTERS_H

#include "events.h"
#include "kernel.h"

/* One entry holds all counters, so that user space needs one lookup. */
struct counters {
	u64 lost;		/* records for which the ring buffer had no room, or a map no memory */
	u64 unchanged;		/* calls that left the window as it was */
	u64 withdrawn;		/* restarts that were due and didn't happen, as when a send blocked */
	u64 lost_recoveries;
	u64 lost_samples;
	u64 guessed;		/* block requests charged to the task that queued them, as their bio wasn't seen */
};
BPF_PERCPU_ARRAY(counters, struct counters, 1);

static __always_inline struct counters *counters_here(void)
{
	int zero = 0;

	return counters.lookup(&zero);
}

/* Adds n to one counter. The lookup is in a function, because bcc doesn't rewrite lookups inside a macro. */
#define count(counter, n) do {					\
	struct counters *here_ = counters_here();		\
								\
	if (here_)						\
		here_->counter += (n);				\
} while (0)

#endif
