/*
 * Which server a client asks for, by the first bytes that it sends: the name in the TLS ClientHello (RFC 6066, 3) or in the Host header of an
 * HTTP/1 request (RFC 9112, 3.2). Bytes of strangers: whatever they are, nothing but an answer comes of them.
 */
#ifndef VMCP_CONTROL_SERVER_NAME_H
#define VMCP_CONTROL_SERVER_NAME_H

#include <stddef.h>
#include <stdint.h>

#define SERVER_NAME_BYTES 256u
#define SERVER_NAME_LOOK  16384u /* so many bytes hold the name, or there is none */

/* 1: `name` is the name, in lower case, without port and final dot: letters, digits, '-', '.' and '_' only. 0: it may be in what is still to come.
 * -ENOENT: there is none. -EPROTO: neither TLS nor HTTP. */
int server_name_find(const uint8_t *data, size_t length, char name[SERVER_NAME_BYTES]);

#endif
