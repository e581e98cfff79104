/*
 * What a VM's process and the agent in its guest say to each other, over the guest's vsock: docs/agent.md.
 *
 * The agent connects to port AGENT_PORT of the host (CID 2). Both sides send lines of printable ASCII, KEY, a space, VALUE, and a newline.
 *
 *     host to guest     vmcp 1, uuid, generation, name, hostname (if one is given), card PCI MAC ADDRESS/LENGTH (of each that is given an
 *                       address), time (if the guest is to have the host's), seed; end
 *     guest to host     agent 1; then for each "end": done EVENT, or failed TEXT and done EVENT
 *
 * The connection stays: its end, which every start, revert and clone brings about, tells the agent to ask again. Unknown keys are passed over, so that
 * either side may be newer.
 */
#ifndef VMCP_GUEST_PROTOCOL_H
#define VMCP_GUEST_PROTOCOL_H

#define AGENT_PORT	   7349u
#define AGENT_VERSION	   "1"
#define AGENT_LINE_BYTES   512u /* the longest line, with its newline */
#define AGENT_MAX_LINES	   64u	/* up to "end" */
#define AGENT_SEED_BYTES   64u
#define AGENT_MAX_CARDS	   8u
#define AGENT_HOSTNAME_MAX 63u /* characters: letters, digits and '-', none of these at either end (RFC 1123) */

#endif
