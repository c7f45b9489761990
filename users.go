package main

import (
	"context"
	"crypto/md5"
	"crypto/rand"
	"crypto/subtle"
	"encoding/base64"
	"encoding/hex"
	"fmt"
	"net/http"
	"net/mail"
	"regexp"
	"strings"
	"time"
	"unicode"
	"unicode/utf8"

	"golang.org/x/crypto/argon2"
)

const (
	maxEmail    = 254  // bytes; the longest address that SMTP can carry (RFC 5321 §4.5.3.1.3, less its angle brackets)
	maxName     = 255  // characters
	maxPassword = 1024 // bytes
)

// A user is someone who signed up. It is never sent to a client as a whole, so
// that the hash cannot leak.
type user struct {
	ID       string `json:"id"`
	Email    string `json:"email"` // as given; unique in lower case
	Name     string `json:"name"`
	Password string `json:"password"` // a hash; see hashPassword
}

// The API document does not say what the response is. The reference server said 422.
var errEmailTaken = invalidFields(map[string]string{"email": "is already registered"})

// signUp responds to POST /users.
func (s *server) signUp(w http.ResponseWriter, r *http.Request) error {
	in := readBody(r)
	u := user{Email: in.email("email"), Name: in.text("name", maxName)}
	password := in.newPassword("password")
	if err := in.err(); err != nil {
		return err
	}
	if _, taken := s.store.userByEmail(u.Email); taken {
		return errEmailTaken // before the work of a hash
	}
	hash, err := s.hashPassword(r.Context(), password)
	if err != nil {
		return err
	}
	u.ID, u.Password = s.store.ids.next(), hash
	return s.startSession(w, u, change{User: &u})
}

// me responds to GET /me.
func (s *server) me(w http.ResponseWriter, _ *http.Request, c caller) error {
	return writeJSON(w, http.StatusOK, struct {
		Email     string `json:"email"`
		Name      string `json:"name"`
		AvatarURL string `json:"avatar_url"`
	}{c.Email, c.Name, avatarURL(c.Email)})
}

// avatarURL returns the URL of the Gravatar for an e-mail, or of a mystery man
// (https://docs.gravatar.com/api/avatars/images/).
func avatarURL(email string) string {
	sum := md5.Sum([]byte(strings.ToLower(email)))
	return "https://www.gravatar.com/avatar/" + hex.EncodeToString(sum[:]) + "?d=mm&s=200"
}

// emailShape is required in addition to the rules of net/mail: ASCII without
// spaces, and a domain of letters, digits, hyphens and dots.
var emailShape = regexp.MustCompile(`^[!-~]+@[A-Za-z0-9.-]+$`)

// isEmail reports whether somebody can sign up with an e-mail. It must be a bare
// address, such as jack-black@codementor.io.
func isEmail(email string) bool {
	if len(email) > maxEmail { // before the work of parsing
		return false
	}
	address, err := mail.ParseAddress(email)
	return err == nil && address.Address == email && emailShape.MatchString(email)
}

// normalizeEmail returns the form in which e-mails are compared: lower case. An
// invalid one is returned unchanged: in lower case, U+212A (Kelvin) would become k.
func normalizeEmail(email string) string {
	if isEmail(email) {
		return strings.ToLower(email)
	}
	return email
}

// email reads the e-mail of a new user.
func (in *input) email(name string) string {
	email := in.text(name, maxEmail)
	if !isEmail(email) {
		in.reject(name, "must be an e-mail address")
	}
	return email
}

// newPassword reads a password by the rules of the API document. It is not
// trimmed.
func (in *input) newPassword(name string) string {
	password := in.secret(name, maxPassword)
	if utf8.RuneCountInString(password) < 8 ||
		!strings.ContainsFunc(password, unicode.IsUpper) ||
		!strings.ContainsFunc(password, unicode.IsLower) ||
		!strings.ContainsFunc(password, unicode.IsNumber) {
		in.reject(name, "must have at least 8 characters, including an upper-case letter, a lower-case letter and a number")
	}
	return password
}

// A semaphore limits how many hashes are computed at a time. Without it, 60 logins
// at once would take more than 1 GB of memory, and slow down everybody else.
type semaphore chan struct{}

var errBusy = &apiError{status: http.StatusServiceUnavailable, retryAfter: 1, Reason: "too many people are logging in or signing up right now; please try again"}

// acquire waits for a slot, for up to 5 seconds, or until the client has gone.
func (s semaphore) acquire(ctx context.Context) error {
	select {
	case s <- struct{}{}:
	case <-ctx.Done():
		return errClientGone
	case <-time.After(5 * time.Second):
		return errBusy
	}
	if ctx.Err() != nil {
		s.release()
		return errClientGone
	}
	return nil
}

func (s semaphore) release() { <-s }

// An argonCost is how hard it is to compute a hash. It is part of each hash, so new
// hashes can have a higher one.
type argonCost struct {
	memory  uint32 // KiB
	passes  uint32
	threads uint8
}

// defaultCost is what OWASP's Password Storage Cheat Sheet asks for.
func defaultCost() argonCost { return argonCost{memory: 19_456, passes: 2, threads: 1} }

// hashPassword returns the hash to be stored.
func (s *server) hashPassword(ctx context.Context, password string) (string, error) {
	if err := s.hashing.acquire(ctx); err != nil {
		return "", err
	}
	defer s.hashing.release()
	salt := make([]byte, 16)
	rand.Read(salt) // never fails
	return argonHash(password, salt, s.hashCost), nil
}

func argonHash(password string, salt []byte, cost argonCost) string {
	sum := argon2.IDKey([]byte(password), salt, cost.passes, cost.memory, cost.threads, 32)
	return formatHash(cost, salt, sum)
}

// formatHash uses the PHC string format
// (https://github.com/P-H-C/phc-string-format).
func formatHash(cost argonCost, salt, sum []byte) string {
	encode := base64.RawStdEncoding.EncodeToString
	return fmt.Sprintf("$argon2id$v=%d$m=%d,t=%d,p=%d$%s$%s",
		argon2.Version, cost.memory, cost.passes, cost.threads, encode(salt), encode(sum))
}

// dummyHash costs as much to check as a real hash, but no password matches it.
func dummyHash(cost argonCost) string { return formatHash(cost, make([]byte, 16), make([]byte, 32)) }

// matches computes the hash again, with the salt and the cost of the old one.
func matches(password, hash string) bool {
	var cost argonCost
	var saltAndSum string
	fmt.Sscanf(hash, "$argon2id$v=19$m=%d,t=%d,p=%d$%s", &cost.memory, &cost.passes, &cost.threads, &saltAndSum)
	encodedSalt, _, _ := strings.Cut(saltAndSum, "$")
	salt, err := base64.RawStdEncoding.DecodeString(encodedSalt)
	if err != nil || cost.passes < 1 || cost.threads < 1 { // argon2.IDKey would panic
		return false
	}
	again := argonHash(password, salt, cost)
	return subtle.ConstantTimeCompare([]byte(again), []byte(hash)) == 1
}

func (s *store) userByEmail(email string) (user, bool) {
	s.mu.RLock()
	defer s.mu.RUnlock()
	if a, known := s.emails[normalizeEmail(email)]; known {
		return a.user, true
	}
	return user{}, false
}

// validate checks what other code relies on.
func (u *user) validate() error {
	if !idShape.MatchString(u.ID) || !isEmail(u.Email) {
		return fmt.Errorf("user %q: the id or the e-mail is invalid", u.ID)
	}
	return nil
}

// addUser applies a sign-up and its login, which is nil in a snapshot: there, sessions
// are changes of their own.
func (m *memory) addUser(u user, first *session) error {
	email := strings.ToLower(u.Email)
	if m.emails[email] != nil {
		return errEmailTaken
	}
	if m.accounts[u.ID] != nil || first != nil && (first.UserID != u.ID || m.sessions[first.Key] != nil) {
		return errInconsistent
	}
	a := &account{user: u}
	m.accounts[u.ID], m.emails[email] = a, a
	m.ids.skip(u.ID)
	if first == nil {
		return nil
	}
	return m.addSession(first)
}
