/*
 * Which of several queues a frame to the guest takes, where the host's side has but one: frames of one flow have the same hash, and so stay in order.
 * A flow is IP addresses and protocol, and of TCP and UDP the ports; of fragments not, as only the first of them has any.
 */
#ifndef VMCP_NET_FLOW_HASH_H
#define VMCP_NET_FLOW_HASH_H

#include <stddef.h>
#include <stdint.h>

/* Of a frame without virtio's header. Untrusted. What is no IP: 0. */
uint32_t net_flow_hash(const uint8_t *frame, size_t bytes);

#endif
