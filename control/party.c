#include "control/party.h"

#include <errno.h>
#include <poll.h>
#include <stdio.h>
#include <string.h>

#include "base/clock.h"

#define LOOK_MS 50
#define AT_ONCE 1 /* a deadline that is over */

void party_close(struct party *party)
{
	for (unsigned i = 0; i < party->count; i++) {
		control_close(party->seats[i].client);
		json_decref(party->seats[i].result);
	}
	store_close(party->store);
}

int party_begin(struct party *party, struct seat *seat, const char *method, json_t *params, struct err *err)
{
	int rc = control_connect(party->store, seat->vm, &seat->client, err);

	if (!rc)
		return control_begin(seat->client, method, params, err);
	json_decref(params);
	return rc;
}

static bool is_busy(const struct seat *seat) { return seat->client && !seat->ended; }

static void note_place(struct seat *seat, const json_t *params)
{
	const char *at = json_string_value(json_object_get(params, "at")), *id = json_string_value(json_object_get(params, "checkpoint"));

	if (!at || !id)
		return; /* of another kind */
	snprintf(seat->at, sizeof(seat->at), "%s", at);
	snprintf(seat->checkpoint, sizeof(seat->checkpoint), "%s", id);
}

/* What has come from it by now. */
static void hear(struct seat *seat)
{
	json_t *message, *result;

	while (is_busy(seat)) {
		int rc = control_next(seat->client, AT_ONCE, NULL, &message, &result, &seat->err);

		if (rc == -ETIMEDOUT)
			return;
		if (message) {
			note_place(seat, json_object_get(message, "params"));
			json_decref(message);
			continue;
		}
		seat->ended = true;
		seat->rc = rc;
		seat->result = result;
	}
}

/* Where all are to be: NULL for the end of their calls. One that has failed is nowhere any more. */
static bool is_there(const struct seat *seat, const char *at) { return !is_busy(seat) || (at && !strcmp(seat->at, at)); }

static int check_patience(const struct party *party, uint64_t until_ns, struct err *err)
{
	if (party->cancel && *party->cancel)
		return err_set(err, ERR_FAILED, ECANCELED, "it was cancelled");
	if (until_ns && clock_now_ns() >= until_ns)
		return err_set(err, ERR_FAILED, ETIMEDOUT, "it was not done in time, and was cancelled");
	return 0;
}

static void listen_to_all(struct party *party, const char *at)
{
	struct pollfd list[STORE_GROUP_MAX];
	nfds_t count = 0;

	for (unsigned i = 0; i < party->count; i++)
		if (!is_there(&party->seats[i], at))
			list[count++] = (struct pollfd){.fd = control_descriptor(party->seats[i].client), .events = POLLIN};
	if (count)
		poll(list, count, LOOK_MS);
	for (unsigned i = 0; i < party->count; i++)
		hear(&party->seats[i]);
}

int party_gather(struct party *party, const char *at, bool strict, uint64_t until_ns, struct err *err)
{
	for (;;) {
		bool all = true;

		for (unsigned i = 0; i < party->count; i++) {
			struct seat *seat = &party->seats[i];

			all &= is_there(seat, at);
			if (!strict || !seat->ended || !(seat->rc || at))
				continue;
			if (!seat->rc)
				return err_set(err, ERR_FAILED, EPROTO, "%s: its process is of another version, and does nothing in groups", seat->vm);
			if (err)
				*err = seat->err;
			return strncmp(seat->err.message, seat->vm, strlen(seat->vm)) ? err_prefix(err, "%s", seat->vm) : -seat->err.number;
		}
		if (all)
			return 0;
		int rc = check_patience(party, until_ns, err);
		if (rc)
			return rc;
		listen_to_all(party, at);
	}
}

void party_go(struct party *party)
{
	for (unsigned i = 0; i < party->count; i++) {
		struct seat *seat = &party->seats[i];

		seat->at[0] = '\0';
		if (is_busy(seat))
			control_tell(seat->client, "group.go", NULL, NULL); /* one that is gone is heard of */
	}
}

void party_give_up(struct party *party, const struct err *why)
{
	for (unsigned i = 0; i < party->count; i++)
		if (is_busy(&party->seats[i]))
			control_tell(party->seats[i].client, "group.give-up", json_pack("{s:s}", "why", why->message), NULL);
	party->cancel = NULL;
	party_gather(party, NULL, false, clock_now_ns() + PARTY_GOODBYE_NS, NULL);
}
