/*
 * The control socket's server: one thread accepts, one thread per connection reads requests and answers them.
 * What the methods do is in methods.c; docs/control.md lists them.
 */
#ifndef VMCP_CONTROL_SERVER_H
#define VMCP_CONTROL_SERVER_H

#include <pthread.h>
#include <stdbool.h>

#include <jansson.h>

#include "base/err.h"
#include "machine/machine.h"

/* What the methods act on. The machine is replaced when the guest resets: methods hold `machine_lock` for reading while they use it. */
struct control_target {
	struct store *store;
	const char *name;
	struct console *console;
	pthread_rwlock_t machine_lock;
	struct machine *machine; /* under machine_lock; NULL while there is none */
	_Atomic bool ending;	 /* the machine is about to go: nothing new is begun on it */
	_Atomic bool held;	 /* it was started to stand still, and nobody has let it go yet */
	_Atomic bool asleep;	 /* it has gone, or is about to, as the VM is suspended */
	pthread_mutex_t
		record_lock; /* within machine_lock: pause or resume together with its entry in the VM's record */
	struct periodic *periodic; /* NULL without periodic checkpoints; immutable while the server runs */
	struct tidy *tidy;	   /* immutable while the server runs; NULL in tests */
	struct events *events;	   /* the same */
	struct agent_host *agent;  /* NULL without vsock; immutable while the server runs */
	/* Ends the process: in any thread, must not block. */
	void (*kill)(void *opaque);
	/* The machine is paused and in checkpoint `id`: drops it until somebody wants it; and that somebody does. As `kill`. NULL in tests. */
	void (*suspend)(void *opaque, const char *id);
	void (*wake)(void *opaque);
	void *opaque;
};

struct control_reader;
struct control_server;

/* Listens on control.sock in the folder `dir` (a leftover of a dead process is replaced: the caller holds the VM's lock). */
int control_server_start(int dir, struct control_target *target, struct control_server **out, struct err *err);
/* Stops accepting, cuts the connections, waits for their threads. The socket file is removed. */
void control_server_stop(struct control_server *server);

/* One request being answered. */
struct control_exchange {
	struct control_target *target;
	int fd; /* of the connection */
	struct control_reader *reader; /* its reading side, for a method that is told something while it works; NULL where there is none */
	json_t *id;
	bool console_taken; /* the connection became a console: the descriptor is the console's */
};
/* methods.c: answers `method`; *result is a new reference. -ENOSYS for an unknown one. */
int control_dispatch(struct control_exchange *exchange, const char *method, const json_t *params, json_t **result,
		     struct err *err);

#endif
