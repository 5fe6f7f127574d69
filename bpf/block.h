/* SPDX-License-Identifier: GPL-2.0 */
/*
 * Block requests under way, and the records of those that are done. Records go to user space in slabs, so that it
 * handles up to SLAB_RECORDS of them at once.
 */
#ifndef CWNDTRACE_BLOCK_H
#define CWNDTRACE_BLOCK_H

#include "counters.h"

#define REQ_OP_BITS 8
/* Operations from this one on are commands to the device. The kernel need not trace their end. */
#define REQ_OP_PASSTHROUGH 32
#define SLAB_RECORDS 256	/* 22 kB; a per-CPU value may have 32 kB */
#ifndef SLOT_BITS
#define SLOT_BITS 14
#endif

/*
 * Slabs go to the first ring, and to the spare one while that is full. Each ring is filled from its beginning to its end
 * all the time, so that a large one would be written and read where the CPU's caches have nothing of it.
 */
BPF_RINGBUF_OUTPUT(block_slabs, RING_PAGES);
#ifdef SPARE_PAGES
BPF_RINGBUF_OUTPUT(spare_slabs, SPARE_PAGES);
#endif

/*
 * A request under way, identified by its address. Before it has a request, a bio under way is identified by its own
 * (block_io_old.bpf.c).
 */
struct flight {
	u64 key;
	u64 start_ns;
	u64 issue_ns;
	u64 sector;
	u64 cgroup_id;
	u64 owner_cgroup_id;
	u32 tgid;
	u32 tid;
	u32 bytes;
	u32 cmd_flags;
	u64 error;
	char comm[16] __attribute__((aligned(8)));
};

/*
 * A direct-mapped table, because array lookups are inlined and hash lookups are calls, which would be half of the
 * cost on fast devices. A request whose slot holds another one goes to the hash. Requests come from a fixed pool per
 * device, so the entry of a request that never finishes (because it was merged into another) is overwritten in time.
 */
BPF_ARRAY(slots, struct flight, 1 << SLOT_BITS);
BPF_HASH(overflow, u64, struct flight, 65536);
BPF_ARRAY(overflow_used, u64, 1);

/* The compiler must not move accesses across this: an interrupt on this CPU may run between any two of them. */
#define barrier() asm volatile("" ::: "memory")

struct slab {
	u32 count;
	u16 busy;
	u16 unannounced;
	struct block_io rec[SLAB_RECORDS];
};
#define SLAB_HEADER (sizeof(struct slab) - SLAB_RECORDS * sizeof(struct block_io))
BPF_PERCPU_ARRAY(slabs, struct slab, 1);

/* A slab of one record. */
struct single_slab {
	u32 count;
	u32 unused;
	struct block_io rec;
};

static __always_inline int slot_of(u64 key)
{
	return (key >> 6) * 0x9E3779B97F4A7C15ULL >> (64 - SLOT_BITS);
}

#ifdef FILTER_CGROUP
BPF_HASH(cgroups, u64, u8, 16384);
#endif

#define ROOT_CGROUP 1	/* its id in cgroup v2 */

/*
 * Returns the cgroup v2 to which the kernel charges a bio; 0 where it doesn't tell. Where v1's blkio is mounted, the
 * kernel charges a cgroup of that hierarchy, whose ids aren't those of v2. Only v2 has the hierarchy number 0, as in
 * /proc/PID/cgroup. Where the cgroup has no io controller, it is the nearest one above that has.
 */
static __always_inline u64 charged(u64 bio)
{
	u64 group = bio ? LOAD_OPT(u64, bio, bio, bi_blkg) : 0;
	u64 cgroup, root;

	if (!group || !SIZE_cgroup_root__hierarchy_id)
		return 0;
	cgroup = LOAD_OPT(u64, LOAD_OPT(u64, group, blkcg_gq, blkcg), blkcg, css__cgroup);
	root = LOAD_OPT(u64, cgroup, cgroup, root);
	if (LOAD_OPT(s32, root, cgroup_root, hierarchy_id))
		return 0;
	return LOAD_OPT(u64, LOAD_OPT(u64, cgroup, cgroup, kn), kernfs_node, id);
}

/* The cgroups of a request: its submitter's, and the one to which it belongs. */
struct cgroup_ids {
	u64 submitter;
	u64 owner;
};

/*
 * Kernel threads are in the root cgroup, and submit for others. What a task of another cgroup submits is its own: the
 * cgroup to which the kernel charges it would be one above, where its own has no io controller.
 */
static __always_inline void find_cgroups(struct cgroup_ids *ids, u64 submitter, u64 bio)
{
	ids->submitter = ids->owner = submitter;
	if (ids->submitter == ROOT_CGROUP)
		ids->owner = charged(bio) ?: ROOT_CGROUP;
}

/* Returns true if the filters let a request pass, which a task of the cgroup submits, and fills in its cgroups then. */
static __always_inline bool wanted(struct cgroup_ids *ids, u64 submitter, u64 bio)
{
#ifdef FILTER_PID
	if (bpf_get_current_pid_tgid() >> 32 != FILTER_PID)
		return false;
#endif
	find_cgroups(ids, submitter, bio);
#ifdef FILTER_CGROUP
	if (!cgroups.lookup(&ids->submitter) && !cgroups.lookup(&ids->owner))
		return false;
#endif
	return true;
}

/*
 * Returns true in the data phase of a flush sequence, whose request ends once more when the sequence does, and for the
 * flush that the kernel makes for it.
 */
static __always_inline bool in_flush_sequence(u32 rq_flags)
{
	return rq_flags & (1 << ENUMERATOR(rqf_flags____RQF_FLUSH_SEQ, 4));
}

static __always_inline struct flight *find(u64 key)
{
	int zero = 0, slot = slot_of(key);
	struct flight *f = slots.lookup(&slot);
	u64 *used;

	if (f && f->key == key)
		return f;
	used = overflow_used.lookup(&zero);
	if (!used || !*used)
		return 0;
	return overflow.lookup(&key);
}

/*
 * Counts a lost record if the previous request at this address was issued: its end was not seen. The kernel may not run
 * programs in the context of tasks that a policy protects, and an end comes in an interrupt over any task. It traces no
 * end at all where a device's queue/iostats is 0. A request that was merged into another one is never issued.
 */
static __always_inline void give_up(const struct flight *f, u64 key)
{
	if (f->key == key && f->issue_ns && (u8)f->cmd_flags < REQ_OP_PASSTHROUGH)
		count(lost, 1);
}

/*
 * Returns true if the key has its slot. Two CPUs may claim the same free slot at the same moment, and one of them gets
 * it. Without a compare-and-swap every key goes to the hash, which is slower and as exact.
 */
static __always_inline bool claim(struct flight *f, u64 key)
{
#ifdef COMPARE_AND_SWAP
	u64 holder = __sync_val_compare_and_swap(&f->key, 0, key);

	return !holder || holder == key;
#else
	return false;
#endif
}

/* Returns the slot of this key, to be filled in; NULL where another key has it, so that the flight goes to the hash. */
static __always_inline struct flight *take(u64 key)
{
	int slot = slot_of(key);
	struct flight *f = slots.lookup(&slot);

	if (!f)
		return 0;
	give_up(f, key);
	return claim(f, key) ? f : 0;
}

/* Adds a flight whose slot is taken. */
static __always_inline void take_overflow(u64 key, const struct flight *f)
{
	int zero = 0;
	struct flight *old = overflow.lookup(&key);
	u64 *used = overflow_used.lookup(&zero);

	if (old)
		give_up(old, key);
	if (overflow.update(&key, (struct flight *)f))
		count(lost, 1);
	else if (used)
		*used = 1;
}

static __always_inline void forget(struct flight *f, u64 key)
{
	int slot = slot_of(key);

	if (f == slots.lookup(&slot))
		f->key = 0;
	else
		overflow.delete(&key);
}

/* Forgets a request whose address one that isn't wanted has now. */
static __always_inline void replaced(u64 key)
{
	struct flight *f = find(key);

	if (f && f->key == key) {
		give_up(f, key);
		forget(f, key);
	}
}

/* io_uring's workers (iou-wrk-N, iou-sqp-N) belong to the application, so its name is recorded. */
static __always_inline void process_name(struct flight *f)
{
	if (f->comm[0] == 'i' && f->comm[1] == 'o' && f->comm[2] == 'u' && f->comm[3] == '-') {
		u64 leader = READ(u64, bpf_get_current_task(), task_struct, group_leader);

		bpf_probe_read_kernel(f->comm, sizeof(f->comm), AT(leader, task_struct, comm));
	}
}

/*
 * Returns an operation as events.h numbers it. These have other numbers in other kernels, stable releases included, in
 * enum req_op or, before 6.0, req_opf. Each sum has one term that isn't 0, or none where there is no such operation.
 */
static __always_inline u8 operation(u8 op)
{
	if (op <= OP_SECURE_ERASE)
		return op;
	if (op == ENUMERATOR(req_op__REQ_OP_ZONE_APPEND, 0) + ENUMERATOR(req_opf__REQ_OP_ZONE_APPEND, 0))
		return OP_ZONE_APPEND;
	if (op == ENUMERATOR(req_op__REQ_OP_ZONE_OPEN, 0) + ENUMERATOR(req_opf__REQ_OP_ZONE_OPEN, 0))
		return OP_ZONE_OPEN;
	if (op == ENUMERATOR(req_op__REQ_OP_ZONE_CLOSE, 0) + ENUMERATOR(req_opf__REQ_OP_ZONE_CLOSE, 0))
		return OP_ZONE_CLOSE;
	if (op == ENUMERATOR(req_op__REQ_OP_ZONE_FINISH, 0) + ENUMERATOR(req_opf__REQ_OP_ZONE_FINISH, 0))
		return OP_ZONE_FINISH;
	if (op == ENUMERATOR(req_op__REQ_OP_ZONE_RESET, 0) + ENUMERATOR(req_opf__REQ_OP_ZONE_RESET, 0))
		return OP_ZONE_RESET;
	if (op == ENUMERATOR(req_op__REQ_OP_ZONE_RESET_ALL, 0) + ENUMERATOR(req_opf__REQ_OP_ZONE_RESET_ALL, 0))
		return OP_ZONE_RESET_ALL;
	if (op == ENUMERATOR(req_op__REQ_OP_WRITE_SAME, 0) + ENUMERATOR(req_opf__REQ_OP_WRITE_SAME, 0))
		return OP_WRITE_SAME;
	return op;
}

static __always_inline void fill_record(struct block_io *r, const struct flight *f, u32 dev)
{
	r->start_ns = f->start_ns;
	r->issue_ns = f->issue_ns;
	r->done_ns = bpf_ktime_get_ns();
	r->sector = f->sector;
	r->cgroup_id = f->cgroup_id;
	r->owner_cgroup_id = f->owner_cgroup_id;
	r->bytes = f->bytes;
	r->dev = dev;
	r->flags = f->cmd_flags >> REQ_OP_BITS;
	r->tgid = f->tgid;
	r->tid = f->tid;
	r->cpu = bpf_get_smp_processor_id();
	r->op = operation(f->cmd_flags);
	r->error = f->error;
	__builtin_memcpy(r->comm, f->comm, sizeof(r->comm));
}

/*
 * User space reads the ring a few times a second. In between, it is woken only when unannounced slabs may fill a
 * quarter of the ring. Otherwise every slab would wake it.
 */
#define WAKE_EVERY (RING_PAGES * 4096 / 4 / sizeof(struct slab) / CPUS)
#define NO_WAKEUP 1		/* BPF_RB_* of linux/bpf.h */
#define FORCE_WAKEUP 2

static __always_inline void hand_on(void *slab, u64 size, u64 flags, u32 records)
{
	if (!block_slabs.ringbuf_output(slab, size, flags))
		return;
#ifdef SPARE_PAGES
	if (!spare_slabs.ringbuf_output(slab, size, flags))
		return;
#endif
	count(lost, records);
}

static __always_inline void submit(struct slab *s)
{
	u64 flags = NO_WAKEUP;
	u64 size = SLAB_HEADER + s->count * sizeof(struct block_io);

	/* This keeps the compiler from dropping the check below, which only the verifier needs. */
	asm volatile("" : "+r"(size));
	if (size > sizeof(*s))
		return;
	if (++s->unannounced >= WAKE_EVERY) {
		s->unannounced = 0;
		flags = FORCE_WAKEUP;
	}
	hand_on(s, size, flags, s->count);
	s->count = 0;
}

/* Adds a finished request to this CPU's slab. */
static __always_inline void keep(const struct flight *f, u32 dev)
{
	int zero = 0;
	struct slab *s = slabs.lookup(&zero);
	u32 n;

	if (!s)
		return;
	if (s->busy) {
		/* This interrupted the CPU while it wrote to the slab, so the record goes out separately. */
		struct single_slab one = {.count = 1};

		fill_record(&one.rec, f, dev);
		hand_on(&one, sizeof(one), NO_WAKEUP, 1);
		return;
	}
	s->busy = 1;
	barrier();
	n = s->count;
	if (n < SLAB_RECORDS) {
		fill_record(&s->rec[n], f, dev);
		s->count = n + 1;
	}
	if (s->count >= SLAB_RECORDS)
		submit(s);
	barrier();
	s->busy = 0;
}

/*
 * User space runs this on each CPU, so that records go out even if no request follows.
 *
 * It must not be one of the attached programs: a run on demand doesn't check whether the program is already
 * running on this CPU, and in kernels where a program has one stack per CPU (6.13 and later) it would
 * overwrite the stack of the interrupted run.
 */
int hand_over(struct bpf_raw_tracepoint_args *ctx)
{
	int zero = 0;
	struct slab *s = slabs.lookup(&zero);

	if (!s || s->busy)
		return 0;
	s->busy = 1;
	barrier();
	if (s->count)
		submit(s);
	barrier();
	s->busy = 0;
	return 0;
}

#endif
