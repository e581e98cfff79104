/* What the host says, line by line. */
#include <arpa/inet.h>
#include <ctype.h>
#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "base/buf.h"
#include "base/bytes.h"
#include "guest/agent.h"

static bool is_made_of(const char *text, const char *characters, size_t least, size_t most)
{
	size_t length = strlen(text);

	return length >= least && length <= most && strspn(text, characters) == length;
}

static bool is_uuid(const char *text)
{
	return is_made_of(text, "0123456789abcdef-", AGENT_UUID_BYTES - 1, AGENT_UUID_BYTES - 1);
}

static bool is_name(const char *text)
{
	for (const char *c = text; *c; c++)
		if (!isalnum((unsigned char)*c) && !strchr("._-", *c))
			return false;
	return isalnum((unsigned char)text[0]) && strlen(text) < AGENT_NAME_BYTES;
}

static bool is_hostname(const char *text)
{
	size_t length = strlen(text);

	return is_name(text) && !strpbrk(text, "._") && length <= AGENT_HOSTNAME_MAX && text[length - 1] != '-';
}

/* "1767225600.123456789" */
static bool parse_time(const char *text, struct timespec *out)
{
	const char *dot = strchr(text, '.');
	size_t seconds = dot ? (size_t)(dot - text) : 0;

	if (seconds < 1 || seconds > 12 || strspn(text, "0123456789") != seconds || !is_made_of(dot + 1, "0123456789", 9, 9))
		return false;
	out->tv_sec = (time_t)strtoll(text, NULL, 10);
	out->tv_nsec = strtol(dot + 1, NULL, 10);
	return true;
}

static bool parse_seed(const char *text, struct agent_identity *identity)
{
	size_t length = strlen(text);

	if (length < 32 || length > sizeof(identity->seed) * 2 || !get_hex(identity->seed, text, length / 2))
		return false;
	identity->seed_bytes = (unsigned)(length / 2);
	return true;
}

/* "0000:00:04.0 52:56:00:00:00:01 10.0.0.5/24" */
static bool parse_card(const char *text, struct agent_identity *identity)
{
	struct agent_card card;
	struct in_addr address;
	int pci_end = 0, mac_end = 0, end = 0;

	if (identity->card_count == AGENT_MAX_CARDS)
		return false;
	if (sscanf(text, "%12[0-9a-f:.]%n %17[0-9a-f:]%n %15[0-9.]/%2u%n", card.pci, &pci_end, card.mac, &mac_end, card.address, &card.length, &end) != 4)
		return false;
	identity->cards[identity->card_count++] = card;
	return pci_end == 12 && mac_end - pci_end == 18 && !text[end] && inet_pton(AF_INET, card.address, &address) == 1 && card.length >= 1 && card.length <= 32;
}

/* Unknown keys are a newer host's. */
static bool take_value(struct agent_identity *identity, const char *key, const char *value)
{
	if (!strcmp(key, "vmcp")) {
		identity->greeted = !strcmp(value, AGENT_VERSION);
		return identity->greeted;
	}
	if (!strcmp(key, "uuid")) {
		snprintf(identity->uuid, sizeof(identity->uuid), "%s", value);
		return is_uuid(value);
	}
	if (!strcmp(key, "generation")) {
		snprintf(identity->generation, sizeof(identity->generation), "%s", value);
		return is_made_of(value, "0123456789abcdef", 0, AGENT_GENERATION_BYTES - 1);
	}
	if (!strcmp(key, "name")) {
		snprintf(identity->name, sizeof(identity->name), "%s", value);
		return is_name(value);
	}
	if (!strcmp(key, "hostname")) {
		snprintf(identity->hostname, sizeof(identity->hostname), "%s", value);
		return is_hostname(value);
	}
	if (!strcmp(key, "card"))
		return parse_card(value, identity);
	if (!strcmp(key, "time")) {
		identity->has_time = parse_time(value, &identity->time);
		return identity->has_time;
	}
	return strcmp(key, "seed") || parse_seed(value, identity);
}

int agent_take_line(struct agent_identity *identity, const char *line, struct err *err)
{
	char key[AGENT_LINE_BYTES];
	size_t length = strcspn(line, " ");
	bool is_end = !strcmp(line, "end");

	if (++identity->lines > AGENT_MAX_LINES || strlen(line) >= AGENT_LINE_BYTES)
		return err_set(err, ERR_FAILED, EPROTO, "the host says too much");
	snprintf(key, sizeof(key), "%.*s", (int)length, line);
	if (!is_end && !take_value(identity, key, line[length] ? line + length + 1 : ""))
		return err_set(err, ERR_FAILED, EPROTO, "the host says '%.80s'", line);
	if (!identity->greeted)
		return err_set(err, ERR_FAILED, EPROTO, "the host does not begin with 'vmcp " AGENT_VERSION "'");
	if (is_end && (!identity->uuid[0] || !identity->name[0]))
		return err_set(err, ERR_FAILED, EPROTO, "the host names no uuid, or no name");
	return is_end;
}

static bool is_blank(char c) { return c == ' ' || c == '\t' || c == '\n' || c == '\r' || c == '\0'; }

char *agent_rename_in_hosts(const char *text, const char *from, const char *to)
{
	size_t from_length = strlen(from), to_length = strlen(to), room = strlen(text) + 1;
	bool within_comment = false, first = true; /* word of the line */
	char *out;

	for (const char *c = text; from_length && (c = strstr(c, from)); c += from_length)
		room += to_length;
	out = xcalloc(1, room);
	for (size_t used = 0; *text;) {
		size_t length = 0;

		if (*text == '\n') {
			within_comment = false;
			first = true;
		}
		within_comment |= *text == '#';
		if (is_blank(*text) || within_comment) {
			out[used++] = *text++;
			continue;
		}
		while (!is_blank(text[length]) && text[length] != '#')
			length++;
		bool named = !first && from_length && length >= from_length && !strncmp(text, from, from_length) &&
			     (length == from_length || text[from_length] == '.');
		size_t skip = named ? from_length : 0;
		if (named) {
			memcpy(out + used, to, to_length);
			used += to_length;
		}
		memcpy(out + used, text + skip, length - skip);
		used += length - skip;
		text += length;
		first = false;
	}
	return out;
}
