/*
 * Encrypted stores: docs/format.md, "Encrypted stores", has every byte.
 *
 * One random key for the store, in its file `format`, encrypted with what scrypt makes of the user's. From it each memory layer has a key of its own
 * (AES-256-XTS, a page is a data unit with its number as tweak), and each checkpoint's state (AES-256-GCM). So the same page is never twice the same, and a page's
 * checksum is that of what is in the file: it tells damage without the key, and nothing about the page.
 *
 * What it is for: a disk, a backup or a copy of the store in other hands. Who can write to the store is no opponent: disks are not encrypted, and nobody could tell that they
 * were changed.
 */
#ifndef VMCP_CHECKPOINT_STORE_CRYPT_H
#define VMCP_CHECKPOINT_STORE_CRYPT_H

#include "checkpoint/store/seal_crypto.h"
#include "checkpoint/store/store.h"

/* For the pages of a memory layer, to be freed by seal_pages_free. *out is NULL where the store is not encrypted. Without its key: as store_check_key. */
int store_layer_cipher(struct store *store, const char *layer, bool encrypt, struct seal_pages **out, struct err *err);
/* In place; pages NULL: nothing is done. */
int store_cipher_pages(struct seal_pages *pages, uint64_t first, uint64_t count, uint8_t *data, struct err *err);

/* --- for the store itself --- */

#define CRYPT_FORMAT_VERSION  2
#define CRYPT_FORMAT_BYTES    256
#define CRYPT_STATE_MORE      48u /* bytes that a state is longer by */

/* The text of `format` of a new store with a new key, which *key then opens without scrypt. */
int crypt_make_format(struct store_key *key, char text[CRYPT_FORMAT_BYTES], struct err *err);
/* The same of a store that has its key, which stays: only what it is encrypted with is another one. */
int crypt_change_format(const struct store *store, struct store_key *key, char text[CRYPT_FORMAT_BYTES], struct err *err);
/* Gives the store, whose `format` that is, its key. -EKEYREJECTED: it is another one. key NULL: the store has none. */
int crypt_open_format(struct store *store, struct store_key *key, const char *text, struct err *err);
int crypt_not_encrypted(const struct store *store, struct err *err); /* that error: -EEXIST, ERR_STATE */
/* Of a store with its key. *out: BUF_INIT before. */
int crypt_seal_state(struct store *store, const char *id, const void *data, size_t length, struct buf *out, struct err *err);
/* In place. -EBADMSG, ERR_DAMAGED: it is not what was written. */
int crypt_open_state(struct store *store, const char *id, struct buf *state, struct err *err);

#endif
