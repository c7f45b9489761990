package main

import (
	"crypto/md5"
	"encoding/hex"
	"encoding/json"
	"errors"
	"net/http"
	"net/mail"
	"regexp"
	"strings"
	"unicode"
	"unicode/utf8"
)

// A user is someone who signed up. No answer is made of it as a whole, so that
// the hash cannot get out.
type user struct {
	ID       serial `json:"id"`
	Email    string `json:"email"` // as given; unique in lower case
	Name     string `json:"name"`
	Password string `json:"password"` // see hashPassword
	profile  []byte // what GET /me answers; made once
}

var errEmailTaken = errors.New("there is a user with this e-mail already")

// signUp answers POST /users.
func (s *server) signUp(w http.ResponseWriter, r *http.Request) error {
	in := readInput(r)
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
	u.ID, u.Password = s.store.newID(), hash
	return s.startSession(w, u, change{User: &u})
}

// me answers GET /me.
func (s *server) me(w http.ResponseWriter, _ *http.Request, u user) error {
	writeBody(w, http.StatusOK, u.profile)
	return nil
}

// avatarURL is the picture that Gravatar has for an e-mail, or its mystery
// man (https://docs.gravatar.com/api/avatars/images/).
func avatarURL(lowerEmail string) string {
	sum := md5.Sum([]byte(lowerEmail))
	return "https://www.gravatar.com/avatar/" + hex.EncodeToString(sum[:]) + "?d=mm&s=200"
}

// maxEmail is the longest address that SMTP can carry, in bytes (RFC 5321
// §4.5.3.1.3, less its angle brackets).
const maxEmail = 254

// emailShape is what is allowed beside net/mail's rules: ASCII without blanks,
// and a domain of letters, digits, hyphens and dots.
var emailShape = regexp.MustCompile(`^[!-~]+@[A-Za-z0-9.-]+$`)

// email reads a bare address, such as jack-black@codementor.io.
func (in *input) email(name string) string {
	email := in.text(name, maxEmail)
	address, err := mail.ParseAddress(email)
	if err != nil || address.Address != email || !emailShape.MatchString(email) {
		in.refuse(name, "must be an e-mail address")
	}
	return email
}

const (
	maxName     = 255  // characters
	maxPassword = 1024 // bytes
)

// newPassword reads a password by the rules of the API document. It is not
// trimmed.
func (in *input) newPassword(name string) string {
	password := in.secret(name, maxPassword)
	if utf8.RuneCountInString(password) < 8 ||
		!strings.ContainsFunc(password, unicode.IsUpper) ||
		!strings.ContainsFunc(password, unicode.IsLower) ||
		!strings.ContainsFunc(password, unicode.IsNumber) {
		in.refuse(name, "must have at least 8 characters, among them an upper-case letter, a lower-case letter and a number")
	}
	return password
}

// addUser applies a sign-up.
func (m *memory) addUser(u user) error {
	email := strings.ToLower(u.Email)
	if _, taken := m.emails[email]; taken {
		return errEmailTaken
	}
	if _, twice := m.users[u.ID]; twice || u.ID == 0 || email == "" {
		return errContradiction
	}
	u.profile, _ = json.Marshal(struct { // never fails: it is text
		Email     string `json:"email"`
		Name      string `json:"name"`
		AvatarURL string `json:"avatar_url"`
	}{u.Email, u.Name, avatarURL(email)})
	m.users[u.ID] = u
	m.emails[email] = u.ID
	m.lastID = max(m.lastID, u.ID)
	return nil
}
