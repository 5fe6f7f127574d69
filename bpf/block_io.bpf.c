// SPDX-License-Identifier: GPL-2.0
/*
 * Traces block requests from block_io_start to block_io_done, which Linux 6.5 and later have. Each record covers both
 * ends of a request.
 */
#include "block.h"

/*
 * Returns a number that stands for a request, as its address would. The verifier lets a program compute nothing of a
 * pointer but its distance from another one. argument() is a call, which takes more than all else at an issue.
 */
static __always_inline u64 key_of(u64 request)
{
	int zero = 0;
	u64 *fixed = overflow_used.lookup(&zero);

	return fixed ? request - (u64)fixed : 0;
}

/* Returns what bpf_get_current_cgroup_id() does, without a call. */
static __always_inline u64 cgroup_of(u64 task)
{
	u64 cgroup = LOAD(u64, LOAD(u64, task, task_struct, cgroups), css_set, dfl_cgrp);

	return LOAD(u64, LOAD(u64, cgroup, cgroup, kn), kernfs_node, id);
}

static __always_inline void start_request(struct flight *f, u64 request, u64 task, const struct cgroup_ids *ids)
{
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
	f->cgroup_id = ids->submitter;
	f->owner_cgroup_id = ids->owner;
	comm[0] = *(volatile u64 *)AT(task, task_struct, comm);
	comm[1] = *(volatile u64 *)(AT(task, task_struct, comm) + 8);
	process_name(f);
}

int on_block_io_start(struct bpf_raw_tracepoint_args *ctx)
{
	u64 request = ctx->args[0];
	u64 rq = key_of(request);
	u64 task = (u64)bpf_get_current_task_btf();
	struct cgroup_ids ids;
	struct flight *f;

	if (!wanted(&ids, cgroup_of(task), LOAD(u64, request, request, bio))) {
		/* An entry of an earlier request at this address must not be taken for this one. */
		replaced(rq);
		return 0;
	}
	f = take(rq);
	if (f) {
		start_request(f, request, task, &ids);
	} else {
		struct flight other = {.key = rq};

		start_request(&other, request, task, &ids);
		take_overflow(rq, &other);
	}
	return 0;
}

/* Merges are over once a request is issued, so its first sector and its length are final here, and only here. */
int on_block_rq_issue(struct bpf_raw_tracepoint_args *ctx)
{
	u64 request = ctx->args[0];
	u64 rq = key_of(request);
	struct flight *f = find(rq);

	if (f && f->key == rq) {
		f->issue_ns = bpf_ktime_get_ns();
		f->bytes = LOAD(u32, request, request, __data_len);
		f->sector = LOAD(u64, request, request, __sector);
	}
	return 0;
}

int on_block_rq_error(struct bpf_raw_tracepoint_args *ctx)
{
	u64 rq = key_of(ctx->args[0]);
	struct flight *f = find(rq);

	if (f && f->key == rq)
		f->error = (u8)ctx->args[1];
	return 0;
}

int on_block_io_done(struct bpf_raw_tracepoint_args *ctx)
{
	u64 request = ctx->args[0];
	u64 rq = key_of(request);
	u64 disk;
	struct flight *f;

	if (in_flush_sequence(LOAD(u32, request, request, rq_flags)))
		return 0;
	f = find(rq);
	if (!f || f->key != rq)
		return 0;
	disk = LOAD(u64, LOAD(u64, request, request, q), request_queue, disk);
	keep(f, LOAD(s32, disk, gendisk, major) << 20 | LOAD(s32, disk, gendisk, first_minor));
	forget(f, rq);
	return 0;
}
