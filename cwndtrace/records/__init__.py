# SPDX-License-Identifier: Apache-2.0
"""The records: laid out once, in ``bpf/events.h``, and what numpy and Arrow make of them."""
