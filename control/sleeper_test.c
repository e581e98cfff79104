/* Who waits in a suspended VM's place. */
#include "control/sleeper.h"

#include <criterion/criterion.h>
#include <errno.h>
#include <netinet/in.h>
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/eventfd.h>
#include <sys/socket.h>
#include <unistd.h>

#include "base/buf.h"

static struct sockaddr_in at(unsigned port)
{
	return (struct sockaddr_in){.sin_family = AF_INET, .sin_port = htons((uint16_t)port), .sin_addr.s_addr = htonl(INADDR_LOOPBACK)};
}
static unsigned free_port(int type)
{
	struct sockaddr_in a = at(0);
	socklen_t length = sizeof(a);
	int fd = socket(AF_INET, type | SOCK_CLOEXEC, 0);
	cr_assert_eq(bind(fd, (struct sockaddr *)&a, sizeof(a)), 0);
	cr_assert_eq(getsockname(fd, (struct sockaddr *)&a, &length), 0);
	close(fd);
	return ntohs(a.sin_port);
}
static void make_config(struct machine_config *config, unsigned tcp, unsigned udp)
{
	char text[256];
	struct err err = ERR_INIT;
	snprintf(text, sizeof(text), "[vm]\nname = web\nmemory = 64M\nkernel = /k\n[net lan]\nmode = user\nforward = tcp:%u:80\nforward = udp:%u:7\n", tcp, udp);
	cr_assert_eq(config_read_text("config", text, config, &err), 0, "%s", err.message);
}
static int call(unsigned port)
{
	struct sockaddr_in a = at(port);
	int fd = socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC, 0);
	cr_assert_eq(connect(fd, (struct sockaddr *)&a, sizeof(a)), 0);
	return fd;
}

/* In the VM's place, when it is awake: gives back what it gets, of `count` callers, in whatever order they come. */
struct server {
	int fd;
	unsigned count;
	pthread_t thread;
};
static void *give_back(void *opaque)
{
	size_t used = 0, size = 300000;
	char *data = malloc(size);
	ssize_t got;
	int fd = *(int *)opaque;
	while ((got = read(fd, data + used, size - used)) > 0)
		used += (size_t)got;
	for (size_t done = 0; done < used; done += (size_t)got)
		if ((got = write(fd, data + done, used - done)) <= 0)
			break;
	close(fd);
	free(data);
	return NULL;
}
static void *serve(void *opaque)
{
	struct server *server = opaque;
	pthread_t threads[8];
	int fds[8];
	for (unsigned i = 0; i < server->count; i++) {
		fds[i] = accept(server->fd, NULL, NULL);
		cr_assert_eq(pthread_create(&threads[i], NULL, give_back, &fds[i]), 0);
	}
	for (unsigned i = 0; i < server->count; i++)
		pthread_join(threads[i], NULL);
	return NULL;
}
static void serve_at(struct server *server, unsigned port, unsigned count)
{
	struct sockaddr_in a = at(port);
	server->count = count;
	server->fd = socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC, 0);
	setsockopt(server->fd, SOL_SOCKET, SO_REUSEADDR, &(int){1}, sizeof(int));
	cr_assert_eq(bind(server->fd, (struct sockaddr *)&a, sizeof(a)), 0, "the port is not free: %s", strerror(errno));
	cr_assert_eq(listen(server->fd, 8), 0);
	cr_assert_eq(pthread_create(&server->thread, NULL, serve, server), 0);
}
static void expect_back(int fd, const char *data, size_t bytes)
{
	static char got[300000];
	size_t used = 0;
	ssize_t n;
	while ((n = read(fd, got + used, sizeof(got) - used)) > 0)
		used += (size_t)n;
	cr_expect(used == bytes && memcmp(got, data, bytes) == 0, "%zu bytes of %zu", used, bytes);
	close(fd);
}

Test(sleeper, callers_reach_the_vm_that_they_woke, .timeout = 60)
{
	static char much[250000];
	unsigned port = free_port(SOCK_STREAM), udp = free_port(SOCK_DGRAM);
	struct machine_config config;
	struct sleeper *sleeper = NULL;
	struct server server;
	struct err err = ERR_INIT;
	bool wanted = true;
	int event = eventfd(0, EFD_CLOEXEC);
	make_config(&config, port, udp);
	cr_assert_eq(sleeper_create(&config, &sleeper, &err), 0, "%s", err.message);
	eventfd_write(event, 1);
	cr_assert_eq(sleeper_wait(sleeper, event, &wanted, &err), 0);
	cr_expect_not(wanted, "nobody but the event");
	eventfd_t value;
	eventfd_read(event, &value);
	int first = call(port), second = call(port);
	cr_assert_eq(write(first, "hello", 5), 5);
	cr_assert_eq(sleeper_wait(sleeper, event, &wanted, &err), 0);
	cr_expect(wanted);
	sleeper_stop_listening(sleeper);
	serve_at(&server, port, 2);
	sleeper_hand_over(sleeper);
	sleeper_destroy(sleeper);
	cr_assert_eq(shutdown(first, SHUT_WR), 0);
	expect_back(first, "hello", 5);
	for (size_t i = 0; i < sizeof(much); i++)
		much[i] = (char)(i * 7 ^ i >> 9);
	for (size_t done = 0; done < sizeof(much);) {
		ssize_t n = write(second, much + done, sizeof(much) - done);
		cr_assert_gt(n, 0);
		done += (size_t)n;
	}
	shutdown(second, SHUT_WR);
	expect_back(second, much, sizeof(much));
	pthread_join(server.thread, NULL);
	close(server.fd);
	close(event);
	config_free(&config);
}

Test(sleeper, datagrams_wake_too, .timeout = 60)
{
	unsigned port = free_port(SOCK_STREAM), udp = free_port(SOCK_DGRAM);
	struct machine_config config;
	struct sleeper *sleeper = NULL, *other;
	struct err err = ERR_INIT;
	bool wanted = false;
	char text[32];
	int event = eventfd(0, EFD_CLOEXEC), fd = socket(AF_INET, SOCK_DGRAM | SOCK_CLOEXEC, 0);
	struct sockaddr_in a = at(udp);
	make_config(&config, port, udp);
	cr_assert_eq(sleeper_create(&config, &sleeper, &err), 0, "%s", err.message);
	cr_assert_eq(sendto(fd, "x", 1, 0, (struct sockaddr *)&a, sizeof(a)), 1);
	cr_assert_eq(sleeper_wait(sleeper, event, &wanted, &err), 0);
	cr_expect(wanted);
	/* A port that somebody has is named. */
	cr_expect_eq(sleeper_create(&config, &other, &err), -EADDRINUSE);
	snprintf(text, sizeof(text), "127.0.0.1:%u", port);
	cr_expect(err.class == ERR_STATE && strstr(err.message, text), "%s", err.message);
	/* One who called and is not handed over is cut off. */
	int caller = call(port);
	sleeper_stop_listening(sleeper);
	sleeper_destroy(sleeper);
	cr_expect_leq(read(caller, text, 1), 0);
	close(caller);
	close(fd);
	close(event);
	config_free(&config);
}
