#include <criterion/criterion.h>
#include <errno.h>
#include <stdio.h>
#include <string.h>
#include <unistd.h>

#include "base/file.h"
#include "checkpoint/store/crypt.h"
#include "checkpoint/store/store_internal.h"
#include "checkpoint/store/store_test.h"

#define LITTLE 1 /* scrypt's log N: it is not what is tested */

/* Of the key "golden": what docs/format.md says, done with other means than ours. */
#define GOLDEN_FORMAT \
	"vmcp store 2\nkey 1 8 1 000102030405060708090a0b0c0d0e0f " \
	"8b641393016e9ae4bd5c416d99f8b1d47d3cc5cada49e2da46d494ccd29bfa49" \
	"eb393a890a5576d86b5304ff5a7aafb8\n"
#define GOLDEN_LAYER "0123456789abcdef0123456789abcdef" /* and the checkpoint */
#define GOLDEN_PAGE \
	"\x5c\x8b\xd2\xed\xc4\x19\xd3\xd0\xdc\xd8\xdc\x6e\xc9\x31\x66\x11" \
	"\x00\x35\x9c\xbe\x55\xb5\xab\x3d\x30\xb5\x80\x47\x96\x5e\x0b\x5c" /* the beginning of page 5, which is all "p" */
#define GOLDEN_STATE \
	"\x76\x6d\x63\x70\x65\x6e\x63\x0a\x01\x00\x00\x00\x00\x00\x00\x00" \
	"\x32\x33\x34\x35\x36\x37\x38\x39\x3a\x3b\x3c\x3d\x00\x00\x00\x00" \
	"\xca\xfa\xfe\xa9\xaf\x73\x4d\xe2\xfb\x30\x31\xf8\x53\x68\xd7\xca" \
	"\x0d\x4d\xb7\x17\x67"

TestSuite(crypt, .init = store_test_make_work, .fini = store_test_remove_work, .timeout = 60);

static char path[128];

static struct store *open_as(const char *secret, int want, bool create)
{
	struct store_key *key = secret ? store_key_new(secret, strlen(secret), LITTLE) : NULL;
	struct store *store = NULL;
	struct err err = ERR_INIT;

	cr_assert_eq(store_open_with_key(path, create, key, &store, &err), want, "%s", err.message);
	store_key_free(key);
	return store;
}

static struct store *make(void)
{
	snprintf(path, sizeof(path), "%s/encrypted", store_test_work);
	return open_as("mine", 0, true);
}

/* IEEE 1619, annex B, vector 10: keys of 256 bits. Its data unit is 512 bytes long, and as each block stands alone begins ours. */
Test(crypt, pages_are_those_of_the_standard)
{
	static const char key_1[] = "\x27\x18\x28\x18\x28\x45\x90\x45\x23\x53\x60\x28\x74\x71\x35\x26"
				    "\x62\x49\x77\x57\x24\x70\x93\x69\x99\x59\x57\x49\x66\x96\x76\x27";
	static const char key_2[] = "\x31\x41\x59\x26\x53\x58\x97\x93\x23\x84\x62\x64\x33\x83\x27\x95"
				    "\x02\x88\x41\x97\x16\x93\x99\x37\x51\x05\x82\x09\x74\x94\x45\x92";
	static const char want[] = "\x1c\x3b\x3a\x10\x2f\x77\x03\x86\xe4\x83\x6c\x99\xe3\x70\xcf\x9b"
				   "\xea\x00\x80\x3f\x5e\x48\x23\x57\xa4\xae\x12\xd4\x14\xa3\xe6\x3b";
	uint8_t key[SEAL_PAGES_KEY_BYTES], page[PAGE_BYTES];

	memcpy(key, key_1, 32);
	memcpy(key + 32, key_2, 32);
	for (size_t i = 0; i < sizeof(page); i++)
		page[i] = (uint8_t)i;
	struct seal_pages *there = seal_pages_new(key, true), *back = seal_pages_new(key, false);
	cr_assert(there && back);
	cr_assert(seal_page(there, 0xff, page));
	cr_assert_arr_eq(page, want, 32);
	cr_assert(seal_page(back, 0xff, page));
	for (size_t i = 0; i < sizeof(page); i++)
		cr_assert_eq(page[i], (uint8_t)i);
	seal_pages_free(there);
	seal_pages_free(back);
}

Test(crypt, a_store_opens_with_its_key_only)
{
	struct store *store = make();
	struct seal_pages *cipher;
	struct err err = ERR_INIT;

	cr_assert(store_is_encrypted(store) && store_check_key(store, NULL) == 0);
	store_close(store);
	store_close(open_as("mine", 0, false));
	cr_assert_null(open_as("other", -EKEYREJECTED, false));
	cr_assert_null(open_as("mine ", -EKEYREJECTED, true));
	store = open_as(NULL, 0, false);
	cr_assert_eq(store_check_key(store, &err), -ENOKEY);
	cr_assert(err.class == ERR_USAGE && err.hint[0]);
	cr_assert_eq(store_layer_cipher(store, "00000000000000000000000000000000", true, &cipher, NULL), -ENOKEY);
	cr_assert_null(cipher);
	store_close(store);
	snprintf(path, sizeof(path), "%s", store_test_folder);
	cr_assert_null(open_as("mine", -EEXIST, true));
}

/* Once it has opened a store, a key opens it without scrypt; and no other one because of that. */
Test(crypt, a_key_remembers_the_store_that_it_opened)
{
	struct store_key *key = store_key_new("mine", 4, LITTLE);
	struct store *store;

	store_close(make());
	cr_assert_eq(store_open_with_key(path, false, key, &store, NULL), 0);
	store_close(store);
	cr_assert_eq(store_open_with_key(path, false, key, &store, NULL), 0);
	cr_assert_eq(store_check_key(store, NULL), 0);
	store_close(store);
	snprintf(path, sizeof(path), "%s/another", store_test_work);
	store_close(open_as("other", 0, true));
	cr_assert_eq(store_open_with_key(path, false, key, &store, NULL), -EKEYREJECTED);
	store_key_free(key);
}

static int change(struct store *store, const char *from, const char *to, struct err *err)
{
	struct store_key *old = store_key_new(from, strlen(from), LITTLE), *now = store_key_new(to, strlen(to), LITTLE);
	int rc = store_change_key(store, old, now, err);

	store_key_free(old);
	store_key_free(now);
	return rc;
}

/* Who has it open goes on, and keeps others from making the catalogue anew; what they write is read with the new key. */
Test(crypt, the_key_changes)
{
	const char *id = "00000000000000000000000000000001";
	CLEANUP_BUF struct buf state = BUF_INIT, before = BUF_INIT, after = BUF_INIT;
	struct store *running = make(), *store = open_as("mine", 0, false);
	struct store_rebuilt rebuilt;
	CLEANUP_FREE char *leftover = xasprintf("%s/.tmp-0123456789abcdef", path);

	store_test_write_text(leftover, "of a change that was killed");
	cr_assert_eq(file_read_all(store->dir, "format", 4096, &before, NULL), 0);
	cr_assert_eq(change(store, "mine", "other", NULL), 0);
	cr_assert_eq(file_read_all(store->dir, "format", 4096, &after, NULL), 0);
	cr_assert_eq(after.length, before.length);
	for (size_t i = sizeof("vmcp store 2\nkey 1 8 1 ") - 1; i + 16 < after.length; i += 16)
		cr_assert_neq(memcmp(before.data + i, after.data + i, 16), 0, "salt or wrapped key stayed at %zu", i);
	cr_assert_neq(access(leftover, F_OK), 0);
	store_close(store);
	cr_assert_null(open_as("mine", -EKEYREJECTED, false));
	cr_assert_eq(crypt_seal_state(running, id, "some state", 10, &state, NULL), 0);
	cr_assert_eq(store_rebuild(path, &rebuilt, NULL), -EBUSY);
	store_close(running);
	cr_assert_eq(store_rebuild(path, &rebuilt, NULL), 0);
	store = open_as("other", 0, false);
	cr_assert_eq(crypt_open_state(store, id, &state, NULL), 0);
	cr_assert(state.length == 10 && memcmp(state.data, "some state", 10) == 0);
	cr_assert_eq(change(store, "other", "other", NULL), 0, "to the same one, with another salt");
	store_close(store);
	store_close(open_as("other", 0, false));
}

Test(crypt, the_key_changes_for_who_has_it_only)
{
	struct store *store = make(), *slower = open_as("mine", 0, false), *without = open_as(NULL, 0, false);
	struct err err = ERR_INIT;

	cr_assert_eq(change(store, "another", "other", &err), -EKEYREJECTED);
	cr_assert(err.class == ERR_FAILED && err.hint[0]);
	cr_assert_eq(change(without, "mine", "other", NULL), -ENOKEY);
	store_close(open_as("mine", 0, false));
	cr_assert_eq(change(store, "mine", "other", NULL), 0);
	cr_assert_eq(change(slower, "mine", "third", NULL), -EKEYREJECTED, "it was changed since");
	cr_assert_eq(change(slower, "other", "third", NULL), 0);
	store_close(store);
	store_close(slower);
	store_close(without);
	store_close(open_as("third", 0, false));
	err = ERR_INIT;
	cr_assert_eq(change(store_test_store, "mine", "other", &err), -EEXIST, "a plain store");
	cr_assert(err.class == ERR_STATE && err.hint[0]);
}

Test(crypt, a_store_of_this_version_stays_readable)
{
	struct seal_pages *cipher;
	struct store *store;
	CLEANUP_BUF struct buf state = BUF_INIT;
	uint8_t page[PAGE_BYTES];
	char file[160];

	store_close(make());
	snprintf(file, sizeof(file), "%s/format", path);
	store_test_write_text(file, GOLDEN_FORMAT);
	store = open_as("golden", 0, false);
	cr_assert_eq(store_layer_cipher(store, GOLDEN_LAYER, true, &cipher, NULL), 0);
	memset(page, 'p', sizeof(page));
	cr_assert_eq(store_cipher_pages(cipher, 5, 1, page, NULL), 0);
	cr_assert_arr_eq(page, GOLDEN_PAGE, 32);
	cr_assert_eq(buf_append(&state, GOLDEN_STATE, sizeof(GOLDEN_STATE) - 1, NULL), 0);
	cr_assert_eq(crypt_open_state(store, GOLDEN_LAYER, &state, NULL), 0);
	cr_assert_eq(state.length, 5);
	cr_assert_arr_eq(state.data, "state", 5);
	seal_pages_free(cipher);
	store_close(store);
}

Test(crypt, states_are_authenticated)
{
	struct store *store = make();
	const char *id = "00000000000000000000000000000001";
	CLEANUP_BUF struct buf good = BUF_INIT, again = BUF_INIT;

	cr_assert_eq(crypt_seal_state(store, id, "some state", 10, &good, NULL), 0);
	cr_assert_eq(crypt_seal_state(store, id, "some state", 10, &again, NULL), 0);
	cr_assert(good.length == 10 + CRYPT_STATE_MORE && again.length == good.length);
	cr_assert_neq(memcmp(good.data + CRYPT_STATE_MORE, again.data + CRYPT_STATE_MORE, 10), 0, "a nonce was used twice");
	for (size_t i = 0; i < good.length; i++) {
		CLEANUP_BUF struct buf bad = BUF_INIT;
		struct err err = ERR_INIT;

		cr_assert_eq(buf_append(&bad, good.data, good.length, NULL), 0);
		bad.data[i] ^= 0x20;
		cr_assert_eq(crypt_open_state(store, id, &bad, &err), -EBADMSG, "byte %zu", i);
		cr_assert_eq(err.class, ERR_DAMAGED);
	}
	for (size_t length = 0; length < good.length; length++) {
		CLEANUP_BUF struct buf bad = BUF_INIT;

		cr_assert_eq(buf_append(&bad, good.data, length, NULL), 0);
		cr_assert_eq(crypt_open_state(store, id, &bad, NULL), -EBADMSG, "length %zu", length);
	}
	cr_assert_eq(crypt_open_state(store, "00000000000000000000000000000002", &again, NULL), -EBADMSG, "another checkpoint's");
	cr_assert_eq(crypt_open_state(store, id, &good, NULL), 0);
	cr_assert(good.length == 10 && memcmp(good.data, "some state", 10) == 0);
	store_close(store);
}

/* Whatever byte of `format` is another one: it is refused, and nothing else happens. */
Test(crypt, a_damaged_format_is_refused)
{
	CLEANUP_BUF struct buf good = BUF_INIT;
	struct store *store = make();

	cr_assert_eq(file_read_all(store->dir, "format", 4096, &good, NULL), 0);
	store_close(store);
	for (size_t i = 0; i < good.length; i++) {
		for (unsigned mask = 1; mask < 256; mask <<= 3) {
			struct store_key *key = store_key_new("mine", 4, LITTLE);
			CLEANUP_FREE char *bad = strndup((char *)good.data, good.length);
			CLEANUP_FREE char *file = xasprintf("%s/format", path);
			struct err err = ERR_INIT;

			bad[i] = (char)(bad[i] ^ (char)mask);
			store_test_write_text(file, bad);
			int rc = store_open_with_key(path, false, key, &store, &err);
			cr_assert_neq(rc, 0, "byte %zu", i);
			cr_assert(rc == -EINVAL || rc == -EKEYREJECTED || rc == -ENOTSUP || rc == -EEXIST, "byte %zu: %s", i, err.message);
			store_key_free(key);
		}
	}
}

Test(crypt, a_layer_never_has_the_key_of_another)
{
	struct store *store = make();
	uint8_t pages[3][PAGE_BYTES];
	struct seal_pages *one, *other;

	memset(pages, 0, sizeof(pages));
	cr_assert_eq(store_layer_cipher(store, "00000000000000000000000000000001", true, &one, NULL), 0);
	cr_assert_eq(store_layer_cipher(store, "00000000000000000000000000000002", true, &other, NULL), 0);
	cr_assert_eq(store_cipher_pages(one, 7, 1, pages[0], NULL), 0);
	cr_assert_eq(store_cipher_pages(one, 8, 1, pages[1], NULL), 0);
	cr_assert_eq(store_cipher_pages(other, 7, 1, pages[2], NULL), 0);
	cr_assert(memcmp(pages[0], pages[1], 16) && memcmp(pages[0], pages[2], 16));
	seal_pages_free(one);
	seal_pages_free(other);
	store_close(store);
}
