# SPDX-License-Identifier: Apache-2.0
"""What ``cwndtrace top`` shows: figures of bounded size, from rows of a capture as they come."""
