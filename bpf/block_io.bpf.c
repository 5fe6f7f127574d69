// SPDX-License-Identifier: GPL-2.0
/*
 * Traces block requests from block_io_start to block_io_done. Each record covers both ends of a request. Records go
 * to user space in slabs, so that it handles up to SLAB_RECORDS of them at once.
 */
#include "counters.h"

#define REQ_OP_BITS 8
/* Operations from this one on are commands to the device. The kernel need not trace their end. */
#define REQ_OP_PASSTHROUGH 32
#define SLAB_RECORDS 256	/* 20 kB; a per-CPU value may have 32 kB */
#ifndef SLOT_BITS
#define SLOT_BITS 14
#endif

BPF_RINGBUF_OUTPUT(block_slabs, RING_PAGES);

/* A request under way, identified by its address. */
struct flight {
	u64 rq;
	u64 start_ns;
	u64 issue_ns;
	u64 sector;
	u64 cgroup_id;
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

static __always_inline int slot_of(u64 rq)
{
	return (rq >> 6) * 0x9E3779B97F4A7C15ULL >> (64 - SLOT_BITS);
}

#ifdef FILTER_CGROUP
BPF_HASH(cgroups, u64, u8, 16384);
#endif

static __always_inline bool wanted(void)
{
#ifdef FILTER_PID
	if (bpf_get_current_pid_tgid() >> 32 != FILTER_PID)
		return false;
#endif
#ifdef FILTER_CGROUP
	u64 cgroup = bpf_get_current_cgroup_id();

	if (!cgroups.lookup(&cgroup))
		return false;
#endif
	return true;
}

static __always_inline struct flight *find(u64 rq)
{
	int zero = 0, slot = slot_of(rq);
	struct flight *f = slots.lookup(&slot);
	u64 *used;

	if (f && f->rq == rq)
		return f;
	used = overflow_used.lookup(&zero);
	if (!used || !*used)
		return 0;
	return overflow.lookup(&rq);
}

/*
 * Returns true if the request has its slot. Two CPUs may claim the same free slot at the same moment, and one of them
 * gets it. clang compiles BPF's compare-and-swap only for a CPU model that it detects by asking the kernel, which it
 * does on x86-64.
 */
static __always_inline bool claim(struct flight *f, u64 rq)
{
	u64 holder;

#ifdef CWT_ARCH_X86_64
	holder = __sync_val_compare_and_swap(&f->rq, 0, rq);
#else
	holder = f->rq;
	if (!holder)
		f->rq = rq;
#endif
	return !holder || holder == rq;
}

/*
 * Counts a lost record if the previous request at this address was issued: its end was not seen. The kernel may not run
 * programs in the context of tasks that a policy protects, and an end comes in an interrupt over any task. It traces no
 * end at all where a device's queue/iostats is 0. A request that was merged into another one is never issued.
 */
static __always_inline void give_up(const struct flight *f, u64 rq)
{
	if (f->rq == rq && f->issue_ns && (u8)f->cmd_flags < REQ_OP_PASSTHROUGH)
		count(lost, 1);
}

/* Fills a claimed slot, or an entry for the hash. */
static __always_inline void start_request(struct flight *f, u64 request)
{
	u64 task = (u64)bpf_get_current_task_btf();
	u64 *comm = (u64 *)f->comm;

	f->start_ns = bpf_ktime_get_ns();
	f->issue_ns = 0;
	f->bytes = 0;
	f->error = 0;
	/* The flags are read here, because a flush sequence clears REQ_PREFLUSH and REQ_FUA later. */
	f->cmd_flags = LOAD(u32, request, request, cmd_flags);
	f->sector = LOAD(u64, request, request, __sector);
	f->tgid = LOAD(u32, task, task_struct, tgid);
	f->tid = LOAD(u32, task, task_struct, pid);
	f->cgroup_id = bpf_get_current_cgroup_id();
	comm[0] = *(volatile u64 *)AT(task, task_struct, comm);
	comm[1] = *(volatile u64 *)(AT(task, task_struct, comm) + 8);
	/* io_uring's workers (iou-wrk-N, iou-sqp-N) belong to the application, so its name is recorded. */
	if (f->comm[0] == 'i' && f->comm[1] == 'o' && f->comm[2] == 'u' && f->comm[3] == '-') {
		u64 leader = LOAD(u64, task, task_struct, group_leader);

		bpf_probe_read_kernel(f->comm, sizeof(f->comm), AT(leader, task_struct, comm));
	}
}

int on_block_io_start(struct bpf_raw_tracepoint_args *ctx)
{
	u64 rq = argument(ctx, 0);
	u64 request = ctx->args[0];
	int zero = 0, slot = slot_of(rq);
	struct flight *f = slots.lookup(&slot);

	if (!f)
		return 0;
	if (!wanted()) {
		/* An entry of an earlier request at this address must not be taken for this one. */
		f = find(rq);
		if (f) {
			give_up(f, rq);
			f->rq = 0;
		}
		return 0;
	}
	give_up(f, rq);
	if (!claim(f, rq)) {
		struct flight other = {.rq = rq}, *old = overflow.lookup(&rq);
		u64 *used = overflow_used.lookup(&zero);

		if (old)
			give_up(old, rq);
		start_request(&other, request);
		if (overflow.update(&rq, &other))
			count(lost, 1);
		else if (used)
			*used = 1;
		return 0;
	}
	start_request(f, request);
	return 0;
}

/* Merges are over once a request is issued, so its first sector and its length are final here, and only here. */
int on_block_rq_issue(struct bpf_raw_tracepoint_args *ctx)
{
	u64 rq = argument(ctx, 0);
	u64 request = ctx->args[0];
	struct flight *f = find(rq);

	if (f && f->rq == rq) {
		f->issue_ns = bpf_ktime_get_ns();
		f->bytes = LOAD(u32, request, request, __data_len);
		f->sector = LOAD(u64, request, request, __sector);
	}
	return 0;
}

int on_block_rq_error(struct bpf_raw_tracepoint_args *ctx)
{
	u64 rq = argument(ctx, 0);
	struct flight *f = find(rq);

	if (f && f->rq == rq)
		f->error = (u8)ctx->args[1];
	return 0;
}

static __always_inline void fill_record(struct block_io *r, const struct flight *f, u32 dev)
{
	r->start_ns = f->start_ns;
	r->issue_ns = f->issue_ns;
	r->done_ns = bpf_ktime_get_ns();
	r->sector = f->sector;
	r->cgroup_id = f->cgroup_id;
	r->bytes = f->bytes;
	r->dev = dev;
	r->flags = f->cmd_flags >> REQ_OP_BITS;
	r->tgid = f->tgid;
	r->tid = f->tid;
	r->cpu = bpf_get_smp_processor_id();
	r->op = f->cmd_flags;
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
	if (block_slabs.ringbuf_output(s, size, flags))
		count(lost, s->count);
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
		if (block_slabs.ringbuf_output(&one, sizeof(one), NO_WAKEUP))
			count(lost, 1);
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

int on_block_io_done(struct bpf_raw_tracepoint_args *ctx)
{
	u64 rq = argument(ctx, 0);
	u64 request = ctx->args[0];
	u64 disk;
	struct flight *f;
	int slot;

	/* This is the data phase of a flush sequence. The request ends once more when the sequence does. */
	if (LOAD(u32, request, request, rq_flags) & (1 << ENUMERATOR(rqf_flags____RQF_FLUSH_SEQ, 4)))
		return 0;
	f = find(rq);
	if (!f || f->rq != rq)
		return 0;
	disk = LOAD(u64, LOAD(u64, request, request, q), request_queue, disk);
	keep(f, LOAD(s32, disk, gendisk, major) << 20 | LOAD(s32, disk, gendisk, first_minor));
	slot = slot_of(rq);
	if (f == slots.lookup(&slot))
		f->rq = 0;
	else
		overflow.delete(&rq);
	return 0;
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
