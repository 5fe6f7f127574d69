// SPDX-License-Identifier: GPL-2.0
/*
 * Traces block requests where block_io_start and block_io_done are missing, as before Linux 6.5.
 *
 * block_getrq shows a bio that gets a request, in the context of the task that submits it, but not yet the request.
 * That is known when it is queued or given to the driver, and leads back to its bio. It ends when its last byte is
 * done. blk_mq_submit_bio() has the order of the first two, blk_update_request() the last (block/blk-mq.c in 6.1).
 */
#include "block.h"

/* A bio that is merged in front of others gets no request of its own, so the one that did may be behind it. */
#define MOST_BIOS 4

#define FAILFAST_MASK (7 << REQ_OP_BITS)

/* The errors that stand for a status of their own (blk_errors in block/blk-core.c). */
enum errors {
	ENOMEM = 12,
	ENOSPC = 28,
	EBADE = 52,
	ENODATA = 61,
	ENOLINK = 67,
	EILSEQ = 84,
	EOPNOTSUPP = 95,
	ETIMEDOUT = 110,
	EREMOTEIO = 121,
};

static __always_inline void start_bio(struct flight *f, u64 sector, u32 opf, const struct cgroup_ids *ids)
{
	u64 id = bpf_get_current_pid_tgid();

	f->start_ns = bpf_ktime_get_ns();
	f->issue_ns = 0;
	f->bytes = 0;
	f->error = 0;
	f->cmd_flags = opf;
	f->sector = sector;
	f->tgid = id >> 32;
	f->tid = id;
	f->cgroup_id = ids->submitter;
	f->owner_cgroup_id = ids->owner;
	bpf_get_current_comm(f->comm, sizeof(f->comm));
	process_name(f);
}

static __always_inline void start(u64 key, u64 sector, u32 opf, const struct cgroup_ids *ids)
{
	struct flight *f = take(key);

	if (f) {
		start_bio(f, sector, opf, ids);
	} else {
		struct flight other = {.key = key};

		start_bio(&other, sector, opf, ids);
		take_overflow(key, &other);
	}
}

int on_block_getrq(struct bpf_raw_tracepoint_args *ctx)
{
	u64 key = argument(ctx, ARGUMENT(block_getrq, bio));
	u64 bio = ctx->args[ARGUMENT(block_getrq, bio)];
	struct cgroup_ids ids;

	if (wanted(&ids, bpf_get_current_cgroup_id(), bio))
		start(key, LOAD(u64, bio, bio, bi_iter__bi_sector), LOAD(u32, bio, bio, bi_opf), &ids);
	else
		replaced(key);
	return 0;
}

/*
 * Moves a bio's flight to its request, whose flags are opf. Read-ahead can fail fast (blk_rq_bio_prep() in
 * block/blk.h). Returns the request's flight.
 */
static __always_inline struct flight *move(struct flight *from, u64 bio, u64 rq, u32 opf)
{
	struct flight *f = take(rq);

	from->cmd_flags |= opf & FAILFAST_MASK;
	if (f) {
		__builtin_memcpy(&f->start_ns, &from->start_ns, sizeof(*f) - sizeof(f->key));
	} else {
		struct flight copy = *from;

		copy.key = rq;
		take_overflow(rq, &copy);
		f = overflow.lookup(&rq);
	}
	forget(from, bio);
	return f;
}

/* Finds a request's bio that block_getrq has shown. Returns the request's flight, to which it moves the bio's. */
static __always_inline struct flight *lead_back(u64 rq, u64 bio, u32 opf)
{
#pragma unroll
	for (int i = 0; i < MOST_BIOS; i++) {
		struct flight *f = bio ? find(bio) : 0;

		/* An entry of an earlier bio at this address has another sector. */
		if (f && f->key == bio && f->sector == READ(u64, bio, bio, bi_iter__bi_sector))
			return move(f, bio, rq, opf);
		if (bio)
			bio = READ(u64, bio, bio, bi_next);
	}
	return 0;
}

/*
 * Returns the flight of a request that is queued or given to the driver. If none of its bios was seen, it is charged to
 * the task that queues it, and counted.
 */
static __always_inline struct flight *sight(u64 rq, u64 request)
{
	u64 bio = READ(u64, rq, request, bio);
	u32 opf = LOAD(u32, request, request, cmd_flags);
	struct cgroup_ids ids;
	struct flight *f;

	/* A flush that the kernel makes itself has no bio. Neither that nor a command to the device is accounted. */
	if (!bio || (u8)opf >= REQ_OP_PASSTHROUGH)
		return 0;
	f = lead_back(rq, bio, opf);
	if (f)
		return f;
	f = find(rq);
	if (f)
		return f;
	if (!wanted(&ids, bpf_get_current_cgroup_id(), LOAD(u64, request, request, bio)))
		return 0;
	start(rq, LOAD(u64, request, request, __sector), opf, &ids);
	count(guessed, 1);
	return find(rq);
}

int on_block_rq_insert(struct bpf_raw_tracepoint_args *ctx)
{
	sight(argument(ctx, ARGUMENT(block_rq_insert, request)), ctx->args[ARGUMENT(block_rq_insert, request)]);
	return 0;
}

/* Merges are over once a request is issued, so its first sector and its length are final here, and only here. */
int on_block_rq_issue(struct bpf_raw_tracepoint_args *ctx)
{
	u64 rq = argument(ctx, ARGUMENT(block_rq_issue, request));
	u64 request = ctx->args[ARGUMENT(block_rq_issue, request)];
	struct flight *f = sight(rq, request);

	if (f && f->key == rq) {
		f->issue_ns = bpf_ktime_get_ns();
		f->bytes = LOAD(u32, request, request, __data_len);
		f->sector = LOAD(u64, request, request, __sector);
	}
	return 0;
}

/* The request is merged into another one, and has no end of its own. */
int on_block_rq_merge(struct bpf_raw_tracepoint_args *ctx)
{
	u64 rq = argument(ctx, ARGUMENT(block_rq_merge, request));
	struct flight *f = find(rq);

	if (f && f->key == rq)
		forget(f, rq);
	return 0;
}

/* Returns a status as the kernel numbers it, from a status or from the negative error that it was before 5.16. */
static __always_inline u8 status(s32 error)
{
	switch (error) {
	case -EOPNOTSUPP:
		return BLK_STS_NOTSUPP;
	case -ETIMEDOUT:
		return BLK_STS_TIMEOUT;
	case -ENOSPC:
		return BLK_STS_NOSPC;
	case -ENOLINK:
		return BLK_STS_TRANSPORT;
	case -EREMOTEIO:
		return BLK_STS_TARGET;
	case -EBADE:
		return BLK_STS_RESV_CONFLICT;
	case -ENODATA:
		return BLK_STS_MEDIUM;
	case -EILSEQ:
		return BLK_STS_PROTECTION;
	case -ENOMEM:
		return BLK_STS_RESOURCE;
	}
	return error < 0 ? BLK_STS_IOERR : error;
}

int on_block_rq_complete(struct bpf_raw_tracepoint_args *ctx)
{
	u64 rq = argument(ctx, ARGUMENT(block_rq_complete, request));
	s32 error = ctx->args[ARGUMENT(block_rq_complete, request) + 1];
	u32 done = ctx->args[ARGUMENT(block_rq_complete, request) + 2];
	u64 request = ctx->args[ARGUMENT(block_rq_complete, request)];
	u32 left = LOAD(u32, request, request, __data_len);
	struct flight *f;
	u64 disk;

	if (done < left || in_flush_sequence(LOAD(u32, request, request, rq_flags)))
		return 0;
	/* A flush without data is neither queued nor given to the driver, but the kernel's own request in its place. */
	if (!left)
		lead_back(rq, READ(u64, rq, request, bio), LOAD(u32, request, request, cmd_flags));
	f = find(rq);
	if (!f || f->key != rq)
		return 0;
	if (error)
		f->error = status(error);
	if (SIZE_request__rq_disk)	/* until 5.16 */
		disk = LOAD_OPT(u64, request, request, rq_disk);
	else
		disk = LOAD_OPT(u64, LOAD(u64, request, request, q), request_queue, disk);
	keep(f, LOAD(s32, disk, gendisk, major) << 20 | LOAD(s32, disk, gendisk, first_minor));
	forget(f, rq);
	return 0;
}
