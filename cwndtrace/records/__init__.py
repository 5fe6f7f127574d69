# SPDX-License-Identifier: Apache-2.0
"""The records, whose only layout is ``bpf/events.h``, as numpy arrays and Arrow tables."""
