#include "checkpoint/store/crypt.h"

#include <errno.h>
#include <stdio.h>
#include <string.h>

#include "base/bytes.h"
#include "checkpoint/store/store_internal.h"

#define WRAPPED_BYTES (SEAL_KEY_BYTES + SEAL_TAG_BYTES)
#define STATE_MAGIC   "vmcpenc\n"
#define STATE_VERSION 1u
#define STATE_NONCE   16u
#define STATE_TAG     32u /* what is before it is authenticated, too */

struct store_key {
	uint8_t *secret;
	size_t bytes;
	unsigned log_n;
	/* of the store that it opened last: the same one needs no scrypt */
	char format[CRYPT_FORMAT_BYTES];
	uint8_t master[SEAL_KEY_BYTES];
};

struct store_key *store_key_new(const void *secret, size_t bytes, unsigned log_n)
{
	struct store_key *key = xcalloc(1, sizeof(*key));

	key->secret = xcalloc(1, bytes);
	memcpy(key->secret, secret, bytes);
	key->bytes = bytes;
	key->log_n = log_n ? log_n : SEAL_LOG_N;
	return key;
}

void store_key_free(struct store_key *key)
{
	if (!key)
		return;
	explicit_bzero(key->secret, key->bytes);
	free(key->secret);
	explicit_bzero(key, sizeof(*key));
	free(key);
}

static int failed(struct err *err) { return err_set(err, ERR_FAILED, EIO, "encryption: libcrypto %s", seal_why_not()); }

/* --- the file `format` --- */

struct fields {
	unsigned log_n, r, p;
	uint8_t salt[SEAL_SALT_BYTES], wrapped[WRAPPED_BYTES];
};

/* What stands before the wrapped key, and is authenticated with it. */
static int put_start(const struct fields *f, char text[CRYPT_FORMAT_BYTES])
{
	char salt[2 * SEAL_SALT_BYTES + 1];

	put_hex(salt, f->salt, sizeof(f->salt));
	return snprintf(text, CRYPT_FORMAT_BYTES, "vmcp store %d\nkey %u %u %u %s ", CRYPT_FORMAT_VERSION, f->log_n, f->r, f->p, salt);
}

static void put_format(const struct fields *f, char text[CRYPT_FORMAT_BYTES])
{
	char wrapped[2 * WRAPPED_BYTES + 1];
	int n = put_start(f, text);

	put_hex(wrapped, f->wrapped, sizeof(f->wrapped));
	snprintf(text + n, CRYPT_FORMAT_BYTES - (size_t)n, "%s\n", wrapped);
}

/* Only what put_format writes is taken. */
static bool get_format(const char *text, struct fields *f)
{
	char salt[2 * SEAL_SALT_BYTES + 1], wrapped[2 * WRAPPED_BYTES + 1], again[CRYPT_FORMAT_BYTES];

	if (sscanf(text, "vmcp store 2\nkey %u %u %u %32s %96s", &f->log_n, &f->r, &f->p, salt, wrapped) != 5 ||
	    !get_hex(f->salt, salt, sizeof(f->salt)) || !get_hex(f->wrapped, wrapped, sizeof(f->wrapped)))
		return false;
	put_format(f, again);
	return strcmp(again, text) == 0 && seal_may_derive(f->log_n, f->r, f->p);
}

/* The user's key becomes one that encrypts the store's; that one, of a salt of its own, encrypts nothing else. */
static int wrap(const struct store_key *key, struct fields *f, uint8_t master[SEAL_KEY_BYTES], bool encrypt, struct err *err)
{
	char start[CRYPT_FORMAT_BYTES];
	struct seal_crypto *crypto = seal_crypto_new();
	const struct seal_message message = {.extra = (const uint8_t *)start,
					     .extra_bytes = (size_t)put_start(f, start),
					     .in = encrypt ? master : f->wrapped,
					     .bytes = SEAL_KEY_BYTES,
					     .out = encrypt ? f->wrapped : master,
					     .tag = f->wrapped + SEAL_KEY_BYTES};
	int good = -1;

	if (crypto && seal_derive(crypto, key->secret, key->bytes, f->salt, sizeof(f->salt), f->log_n, f->r, f->p))
		good = encrypt ? (seal_encrypt(crypto, &message) ? 1 : -1) : seal_decrypt(crypto, &message);
	seal_crypto_free(crypto);
	if (good < 0)
		return failed(err);
	return good ? 0 : -EKEYREJECTED;
}

static void remember(struct store_key *key, const char *text, const uint8_t master[SEAL_KEY_BYTES])
{
	snprintf(key->format, sizeof(key->format), "%s", text);
	memcpy(key->master, master, SEAL_KEY_BYTES);
}

static int wrap_anew(struct store_key *key, uint8_t master[SEAL_KEY_BYTES], char text[CRYPT_FORMAT_BYTES], struct err *err)
{
	struct fields f = {.log_n = key->log_n, .r = SEAL_R, .p = SEAL_P};

	if (!seal_random(f.salt, sizeof(f.salt)))
		return failed(err);
	int rc = wrap(key, &f, master, true, err);
	if (!rc) {
		put_format(&f, text);
		remember(key, text, master);
	}
	return rc;
}

int crypt_make_format(struct store_key *key, char text[CRYPT_FORMAT_BYTES], struct err *err)
{
	uint8_t master[SEAL_KEY_BYTES];
	int rc = seal_random(master, sizeof(master)) ? wrap_anew(key, master, text, err) : failed(err);

	explicit_bzero(master, sizeof(master));
	return rc;
}

int crypt_change_format(const struct store *store, struct store_key *key, char text[CRYPT_FORMAT_BYTES], struct err *err)
{
	uint8_t master[SEAL_KEY_BYTES];

	memcpy(master, store->master, sizeof(master));
	int rc = wrap_anew(key, master, text, err);
	explicit_bzero(master, sizeof(master));
	return rc;
}

int crypt_open_format(struct store *store, struct store_key *key, const char *text, struct err *err)
{
	uint8_t master[SEAL_KEY_BYTES];
	struct fields f;
	int rc = 0;

	store->encrypted = true;
	if (!get_format(text, &f))
		return err_set(err, ERR_DAMAGED, EINVAL, "%s/format: damaged", store->path);
	if (!key)
		return 0;
	if (strcmp(key->format, text) != 0) {
		rc = wrap(key, &f, master, false, err);
		if (!rc)
			remember(key, text, master);
		explicit_bzero(master, sizeof(master));
	}
	if (rc == -EKEYREJECTED) {
		err_set(err, ERR_FAILED, EKEYREJECTED, "store %s: the key does not fit", store->path);
		err_hint(err, "name its key: --store-key FILE. `vmcp rekey` may have changed it");
	}
	if (rc)
		return rc;
	memcpy(store->master, key->master, sizeof(store->master));
	store->has_key = true;
	return 0;
}

int crypt_not_encrypted(const struct store *store, struct err *err)
{
	err_set(err, ERR_STATE, EEXIST, "store %s: it is not encrypted", store->path);
	err_hint(err, "export its checkpoints, and import them into a new store that --store-key encrypts; or leave out --store-key");
	return -EEXIST;
}

bool store_is_encrypted(const struct store *store) { return store->encrypted; }

int store_check_key(const struct store *store, struct err *err)
{
	if (!store->encrypted || store->has_key)
		return 0;
	err_set(err, ERR_USAGE, ENOKEY, "store %s: it is encrypted, and no key was named", store->path);
	err_hint(err, "name the file with its key: --store-key FILE, or VMCP_STORE_KEY");
	return -ENOKEY;
}

/* --- memory --- */

/* Of one layer or state, whose id is never used again. */
static int derive(struct store *store, const char *what, const char *id, uint8_t out[SEAL_HMAC_BYTES], struct err *err)
{
	char text[STORE_ID_BYTES + 16];
	int rc = store_check_key(store, err);

	if (rc)
		return rc;
	snprintf(text, sizeof(text), "vmcp %s %s", what, id);
	return seal_hmac(store->master, text, out) ? 0 : failed(err);
}

int store_layer_cipher(struct store *store, const char *layer, bool encrypt, struct seal_pages **out, struct err *err)
{
	uint8_t key[SEAL_HMAC_BYTES];

	*out = NULL;
	if (!store->encrypted)
		return 0;
	int rc = derive(store, "layer", layer, key, err);
	if (rc)
		return rc;
	_Static_assert(SEAL_PAGES_KEY_BYTES == SEAL_HMAC_BYTES, "all of it is the key");
	*out = seal_pages_new(key, encrypt);
	explicit_bzero(key, sizeof(key));
	return *out ? 0 : failed(err);
}

int store_cipher_pages(struct seal_pages *pages, uint64_t first, uint64_t count, uint8_t *data, struct err *err)
{
	_Static_assert(SEAL_PAGE_BYTES == PAGE_BYTES, "a page is a data unit");
	for (uint64_t i = 0; pages && i < count; i++)
		if (!seal_page(pages, first + i, data + i * PAGE_BYTES))
			return failed(err);
	return 0;
}

/* --- state --- */

static int state_crypto(struct store *store, const char *id, struct seal_crypto **out, struct err *err)
{
	uint8_t key[SEAL_HMAC_BYTES];
	int rc = derive(store, "state", id, key, err);

	if (rc)
		return rc;
	*out = seal_crypto_new();
	if (*out)
		seal_set_key(*out, key);
	explicit_bzero(key, sizeof(key));
	return *out ? 0 : failed(err);
}

/* `file` begins with the fields, and behind them is the text. */
static struct seal_message state_message(uint8_t *file, size_t bytes)
{
	struct seal_message m = {.extra = file, .extra_bytes = STATE_TAG, .bytes = bytes, .out = file + CRYPT_STATE_MORE, .tag = file + STATE_TAG};

	memcpy(m.nonce, file + STATE_NONCE, SEAL_NONCE_BYTES);
	return m;
}

int crypt_seal_state(struct store *store, const char *id, const void *data, size_t length, struct buf *out, struct err *err)
{
	struct seal_crypto *crypto = NULL;
	int rc = state_crypto(store, id, &crypto, err);

	if (!rc)
		rc = buf_append(out, NULL, CRYPT_STATE_MORE + length, err);
	if (!rc) {
		memcpy(out->data, STATE_MAGIC, 8);
		put_le32(out->data + 8, STATE_VERSION);
		/* Random, as an import gives its checkpoint the same id each time. */
		bool good = seal_random(out->data + STATE_NONCE, SEAL_NONCE_BYTES);
		struct seal_message message = state_message(out->data, length);
		message.in = data;
		rc = good && seal_encrypt(crypto, &message) ? 0 : failed(err);
	}
	seal_crypto_free(crypto);
	return rc;
}

int crypt_open_state(struct store *store, const char *id, struct buf *state, struct err *err)
{
	static const uint8_t version[] = {STATE_VERSION, 0, 0, 0, 0, 0, 0, 0};
	struct seal_crypto *crypto;

	if (state->length < CRYPT_STATE_MORE || memcmp(state->data, STATE_MAGIC, 8) || memcmp(state->data + 8, version, sizeof(version)))
		return err_set(err, ERR_DAMAGED, EBADMSG, "checkpoint %.8s: state: it is not encrypted as this store is", id);
	int rc = state_crypto(store, id, &crypto, err);
	if (rc)
		return rc;
	struct seal_message message = state_message(state->data, state->length - CRYPT_STATE_MORE);
	message.in = message.out;
	int good = seal_decrypt(crypto, &message);
	seal_crypto_free(crypto);
	if (good < 0)
		return failed(err);
	if (!good)
		return err_set(err, ERR_DAMAGED, EBADMSG, "checkpoint %.8s: state: it was changed", id);
	state->length -= CRYPT_STATE_MORE;
	memmove(state->data, state->data + CRYPT_STATE_MORE, state->length);
	return 0;
}
