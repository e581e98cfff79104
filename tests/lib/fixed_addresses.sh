#!/bin/sh
# fixed_addresses.sh COMMAND [ARG...]: runs it without address randomisation where that can be had.
# The ThreadSanitizer of older compilers now and then does not start where the kernel uses 32 random bits.
if command -v setarch >/dev/null 2>&1 && setarch -R true 2>/dev/null; then
	exec setarch -R "$@"
fi
exec "$@"
