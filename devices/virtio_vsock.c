#include "devices/virtio_vsock.h"

#include <errno.h>
#include <stdlib.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/random.h>
#include <sys/socket.h>
#include <unistd.h>

#include "base/buf.h"
#include "base/bytes.h"
#include "base/log.h"
#include "devices/virtio_vsock_internal.h"

#define CLASS_OTHER	  0x078000u /* communication controller */
#define QUEUE_SIZE	  128u
#define CONFIG_BYTES	  8u /* guest_cid */
#define PACKETS_IN_A_TURN 64u
#define EVENT_BYTES	  4u
#define EVENT_RESET	  0u

/* What a checkpoint saves: connections end with it. */
struct vsock_saved {
	struct virtio_state virtio;
	uint64_t guest_cid;
};
static const struct codec_field state_fields[] = {
	CODEC_SUB(struct vsock_saved, virtio, &virtio_state_table),
	CODEC_INT(struct vsock_saved, guest_cid, CODEC_U64),
	CODEC_END,
};
static const struct codec_table state_table = {"virtio-vsock", sizeof(struct vsock_saved), state_fields};

/* --- headers (5.10.6) --- */

static void decode(const uint8_t *raw, struct vsock_header *h)
{
	*h = (struct vsock_header){
		.from_cid = get_le64(raw),
		.to_cid = get_le64(raw + 8),
		.from_port = get_le32(raw + 16),
		.to_port = get_le32(raw + 20),
		.bytes = get_le32(raw + 24),
		.type = get_le16(raw + 28),
		.op = get_le16(raw + 30),
		.flags = get_le32(raw + 32),
		.buffer_bytes = get_le32(raw + 36),
		.forwarded = get_le32(raw + 40),
	};
}

static void encode(const struct vsock_header *h, uint8_t *raw)
{
	put_le64(raw, h->from_cid);
	put_le64(raw + 8, h->to_cid);
	put_le32(raw + 16, h->from_port);
	put_le32(raw + 20, h->to_port);
	put_le32(raw + 24, h->bytes);
	put_le16(raw + 28, h->type);
	put_le16(raw + 30, h->op);
	put_le32(raw + 32, h->flags);
	put_le32(raw + 36, h->buffer_bytes);
	put_le32(raw + 40, h->forwarded);
}

/* --- queues --- */

/* 1, 0 if there is no packet or no buffer, or -EPROTO. */
static int give_packet(struct virtio_vsock *v, struct virtqueue *q, struct err *err)
{
	struct vsock_header h;
	int ret = virtq_pop(q, &v->chain, err);

	if (ret != 1)
		return ret;
	if (v->chain.out_count > 0 || v->chain.in_bytes <= VSOCK_HEADER_BYTES)
		return err_set(err, ERR_FAILED, EPROTO, "receive chain %u has %u readable segments and %llu writable bytes", v->chain.head,
			       v->chain.out_count, (unsigned long long)v->chain.in_bytes);
	if (!vsock_next(v, v->chain.in_bytes - VSOCK_HEADER_BYTES, &h, v->packet + VSOCK_HEADER_BYTES)) {
		virtq_unpop(q, 1);
		return 0;
	}
	encode(&h, v->packet);
	virtq_copy_to(&v->chain, 0, v->packet, VSOCK_HEADER_BYTES + h.bytes);
	ret = virtq_push(q, v->chain.head, VSOCK_HEADER_BYTES + h.bytes, err);
	return ret < 0 ? ret : 1;
}

static int take_packet(struct virtio_vsock *v, struct virtqueue *q, struct err *err)
{
	struct vsock_header h;
	int ret = virtq_pop(q, &v->chain, err);

	if (ret != 1)
		return ret;
	if (v->chain.in_count > 0 || v->chain.out_bytes < VSOCK_HEADER_BYTES || v->chain.out_bytes > sizeof(v->packet))
		return err_set(err, ERR_FAILED, EPROTO, "send chain %u has %u writable segments and %llu bytes", v->chain.head, v->chain.in_count,
			       (unsigned long long)v->chain.out_bytes);
	uint64_t bytes = virtq_copy_from(&v->chain, 0, v->packet, sizeof(v->packet));
	decode(v->packet, &h);
	if (h.bytes > bytes - VSOCK_HEADER_BYTES)
		return err_set(err, ERR_FAILED, EPROTO, "send chain %u: a packet of %u bytes in %llu", v->chain.head, h.bytes,
			       (unsigned long long)bytes);
	vsock_take(v, &h, v->packet + VSOCK_HEADER_BYTES);
	ret = virtq_push(q, v->chain.head, 0, err);
	return ret < 0 ? ret : 1;
}

/*
 * Linux handles events and packets in works of their own: a connection that begins while the reset waits for its turn would be ended by it. Once the
 * driver has acted on an event it gives the buffer back.
 */
static void look_at_hold(struct virtio_vsock *v, struct virtqueue *q)
{
	if (v->held && (v->event_due || !virtq_rearm_after(q, v->offered)))
		return;
	if (v->held)
		vsock_wake(v);
	v->held = false;
	virtq_rearm(q);
}

/* Once there is a buffer for it. */
static int give_event(struct virtio_vsock *v, struct virtqueue *q, struct err *err)
{
	uint8_t event[EVENT_BYTES];
	int ret = v->event_due ? virtq_pop(q, &v->chain, err) : 0;

	if (ret == 0 && virtq_rearm(q) && v->event_due)
		virtio_kick(v->vdev, VSOCK_EVENT);
	if (ret != 1)
		return ret;
	if (v->chain.out_count > 0 || v->chain.in_bytes < EVENT_BYTES)
		return err_set(err, ERR_FAILED, EPROTO, "event chain %u has %llu writable bytes", v->chain.head,
			       (unsigned long long)v->chain.in_bytes);
	put_le32(event, EVENT_RESET);
	virtq_copy_to(&v->chain, 0, event, sizeof(event));
	v->event_due = false;
	v->offered = virtq_offered(q); /* before it sees the event */
	return virtq_push(q, v->chain.head, EVENT_BYTES, err);
}

static int serve(struct virtio_vsock *v, unsigned queue, struct err *err)
{
	struct virtqueue *q = virtio_queue(v->vdev, queue);
	int ret = 1;

	if (queue == VSOCK_EVENT) {
		ret = give_event(v, q, err);
		look_at_hold(v, q);
		virtio_signal(v->vdev, queue);
		return ret;
	}
	for (unsigned turn = 0; turn < PACKETS_IN_A_TURN && ret == 1; turn++) {
		ret = queue == VSOCK_RECEIVE ? give_packet(v, q, err) : take_packet(v, q, err);
		/* A buffer that is there without a packet for it needs no second look. */
		if (ret == 0 && queue == VSOCK_SEND && virtq_rearm(q))
			ret = 1;
	}
	if (queue == VSOCK_RECEIVE)
		virtq_rearm(q);
	virtio_signal(v->vdev, queue);
	if (ret == 1)
		virtio_kick(v->vdev, queue);
	return ret < 0 ? ret : 0;
}

/* A guest that was put back may still have sockets of connections that another life of it had, in another process: a new connection from the same port
 * would be taken for one of them, and refused. */
static void choose_ports(struct virtio_vsock *v)
{
	if (getrandom(&v->next_port, sizeof(v->next_port), 0) != (ssize_t)sizeof(v->next_port))
		log_warn("vsock: no random numbers: %s", strerror(errno));
}

static void restart(struct virtio_vsock *v)
{
	if (!v->restart)
		return;
	v->restart = false;
	choose_ports(v);
	vsock_close_all(v);
	v->event_due = v->held = v->tell;
}

static void notify(void *opaque, unsigned queue)
{
	struct virtio_vsock *v = opaque;
	struct err err = ERR_INIT;

	restart(v);
	/* The guest hears of the end of its connections before anything else. */
	int ret = v->event_due || queue == VSOCK_EVENT ? serve(v, VSOCK_EVENT, &err) : 0;
	if (ret >= 0 && queue != VSOCK_EVENT)
		ret = serve(v, queue, &err);
	if (ret < 0)
		virtio_break(v->vdev, &err);
}

void vsock_wake(struct virtio_vsock *v) { virtio_kick(v->vdev, VSOCK_RECEIVE); }

bool vsock_enter(struct virtio_vsock *v)
{
	virtio_lock(v->vdev);
	bool same = !v->restart;
	restart(v);
	return same;
}

void vsock_leave(struct virtio_vsock *v) { virtio_unlock(v->vdev); }

static void listener_ready(void *opaque, uint32_t events)
{
	struct virtio_vsock *v = opaque;
	(void)events;

	vsock_enter(v);
	vsock_accept(v);
	vsock_leave(v);
}

/* Of a guest that resets the device nothing is left; its driver knows. In a vCPU's thread: the loop closes the sockets. */
static void do_restart(void *opaque)
{
	struct virtio_vsock *v = opaque;

	vsock_enter(v);
	vsock_leave(v);
	vsock_wake(v);
}

static void cancel(void *opaque)
{
	struct virtio_vsock *v = opaque;

	if (!virtio_is_resetting(v->vdev))
		return;
	v->restart = true;
	v->tell = false;
	loop_post(v->loop, do_restart, v);
}

static void config_read(void *opaque, uint64_t offset, uint8_t *data, unsigned size)
{
	struct virtio_vsock *v = opaque;
	uint8_t config[CONFIG_BYTES];

	put_le64(config, v->guest_cid);
	memcpy(data, config + offset, size);
}

static const struct virtio_ops ops = {.notify = notify, .cancel = cancel, .config_read = config_read};

/* --- life --- */

/* A socket at which nobody listens is left from a process that did not end well. */
static bool is_dead(const struct sockaddr_un *address)
{
	int fd = socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0);
	bool dead = fd >= 0 && connect(fd, (const struct sockaddr *)address, sizeof(*address)) < 0 && errno == ECONNREFUSED;

	if (fd >= 0)
		close(fd);
	return dead;
}

static int listen_at(struct virtio_vsock *v, const char *path, struct err *err)
{
	/* Room for "_4294967295" of the guest's connections. */
	if (strlen(path) + 12 > sizeof(v->address.sun_path)) {
		err_set(err, ERR_USAGE, ENAMETOOLONG, "vsock: the path of its socket is longer than %zu bytes: %s", sizeof(v->address.sun_path) - 12, path);
		return err_hint(err, "choose a store with a shorter path, or a shorter name");
	}
	v->address.sun_family = AF_UNIX;
	memcpy(v->address.sun_path, path, strlen(path) + 1);
	v->listen_fd = socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC | SOCK_NONBLOCK, 0);
	if (v->listen_fd < 0)
		return err_sys(err, errno, "vsock: socket");
	if (is_dead(&v->address))
		unlink(path);
	if (bind(v->listen_fd, (struct sockaddr *)&v->address, sizeof(v->address)) < 0) {
		int number = errno;
		close(v->listen_fd);
		v->listen_fd = -1;
		if (number != EADDRINUSE)
			return err_sys(err, number, "vsock: %s", path);
		err_set(err, ERR_STATE, number, "vsock: another process listens at %s", path);
		return err_hint(err, "end it; `ss -xlp src %s` shows which it is", path);
	}
	if (listen(v->listen_fd, 64) < 0)
		return err_sys(err, errno, "vsock: %s", path);
	return loop_add(v->loop, v->listen_fd, EPOLLIN, listener_ready, v, &v->listener, err);
}

int virtio_vsock_create(struct pci_bus *bus, struct mem *mem, struct loop *io_loop, uint64_t guest_cid, const char *path, struct virtio_vsock **out,
			struct err *err)
{
	struct virtio_vsock *v = xcalloc(1, sizeof(*v));
	const struct virtio_config about = {
		.name = "vsock",
		.device_id = VIRTIO_ID_VSOCK,
		.class_code = CLASS_OTHER,
		.queues = VSOCK_QUEUES,
		.queue_size = QUEUE_SIZE,
		.config_bytes = CONFIG_BYTES,
		.ops = &ops,
		.opaque = v,
	};

	v->loop = io_loop;
	v->guest_cid = guest_cid;
	v->listen_fd = -1;
	int ret = virtio_create(bus, mem, io_loop, &about, &v->vdev, err);
	if (ret == 0)
		ret = listen_at(v, path, err);
	if (ret < 0) {
		virtio_vsock_destroy(v);
		return ret;
	}
	*out = v;
	return 0;
}

void virtio_vsock_destroy(struct virtio_vsock *v)
{
	if (v == NULL)
		return;
	vsock_close_all(v);
	loop_remove(v->loop, v->listener);
	if (v->listen_fd >= 0) {
		close(v->listen_fd);
		unlink(v->address.sun_path);
	}
	virtio_destroy(v->vdev);
	free(v);
}

/* --- state --- */

static int capture(void *opaque, void *state, struct err *err)
{
	struct virtio_vsock *v = opaque;
	struct vsock_saved *s = state;
	(void)err;

	virtio_capture(v->vdev, &s->virtio);
	s->guest_cid = v->guest_cid;
	return 0;
}

static int validate(void *opaque, const void *state, struct err *err)
{
	struct virtio_vsock *v = opaque;
	const struct vsock_saved *s = state;

	if (s->guest_cid != v->guest_cid)
		return err_set(err, ERR_DAMAGED, EINVAL, "vsock: the guest has CID %llu, the device %llu", (unsigned long long)s->guest_cid,
			       (unsigned long long)v->guest_cid);
	return virtio_validate(v->vdev, &s->virtio, err);
}

static int apply(void *opaque, const void *state, struct err *err)
{
	struct virtio_vsock *v = opaque;
	const struct vsock_saved *s = state;

	int ret = virtio_apply(v->vdev, &s->virtio, err);
	if (ret < 0)
		return ret;
	virtio_lock(v->vdev);
	v->restart = v->tell = true;
	virtio_activate(v->vdev);
	virtio_unlock(v->vdev);
	/* Also where the guest has no driver yet. */
	loop_post(v->loop, do_restart, v);
	return 0;
}

static int drain(void *opaque, struct err *err) { return virtio_drain(((struct virtio_vsock *)opaque)->vdev, err); }

struct component virtio_vsock_component(struct virtio_vsock *v, uint32_t instance)
{
	return (struct component){
		.id = "virtio-vsock",
		.instance = instance,
		.version = 1,
		.table = &state_table,
		.opaque = v,
		.capture = capture,
		.validate = validate,
		.apply = apply,
		.drain = drain,
	};
}
