package main

import (
	"bytes"
	"cmp"
	"encoding/json"
	"errors"
	"fmt"
	"math"
	"net/http"
	"slices"
	"strconv"
	"strings"
	"time"
)

// An idea is what a client gets, and what the store keeps. Once stored it is
// never changed, only replaced, so a reader may use it without a lock.
type idea struct {
	ID         string  `json:"id"`
	Content    string  `json:"content"`
	Impact     int     `json:"impact"`
	Ease       int     `json:"ease"`
	Confidence int     `json:"confidence"`
	Average    average `json:"average_score"`
	Created    int64   `json:"created_at"` // seconds since 1970

	Owner string `json:"owner,omitempty"` // a user's id; in the files only
	json  []byte // what the client gets, see seal
}

// An average is always written with a decimal point: 8.0, 6.333333333333333.
type average float64

func (a average) MarshalJSON() ([]byte, error) {
	s := strconv.FormatFloat(float64(a), 'f', -1, 64)
	if !strings.Contains(s, ".") {
		s += ".0"
	}
	return []byte(s), nil
}

const pageSize = 10

var errNoIdea = errors.New("you have no such idea")

// createIdea answers POST /ideas.
func (s *server) createIdea(w http.ResponseWriter, r *http.Request, u user) error {
	i, err := readIdea(r)
	if err != nil {
		return err
	}
	i.ID, i.Owner, i.Created = s.store.newID(), u.ID, time.Now().Unix()
	if err := i.seal(); err != nil {
		return err
	}
	if err := s.store.createIdea(i); err != nil {
		return err
	}
	writeBody(w, http.StatusCreated, i.json)
	return nil
}

// deleteIdea answers DELETE /ideas/{id}.
func (s *server) deleteIdea(w http.ResponseWriter, r *http.Request, u user) error {
	if err := s.store.deleteIdea(u.ID, r.PathValue("id")); err != nil {
		return err
	}
	w.WriteHeader(http.StatusNoContent)
	return nil
}

// listIdeas answers GET /ideas with one page.
func (s *server) listIdeas(w http.ResponseWriter, r *http.Request, u user) error {
	in := readQuery(r)
	page := 1
	if in.has("page") {
		page = in.integer("page", math.MaxInt, "must be an integer above 0")
	}
	if err := in.err(); err != nil {
		return err
	}
	ideas, total := s.store.pageOfIdeas(u.ID, page)
	w.Header().Set("Link", links(page, total))
	writeBody(w, http.StatusOK, jsonList(ideas))
	return nil
}

// jsonList makes a list of what is JSON already.
func jsonList(elements [][]byte) []byte {
	return slices.Concat([]byte("["), bytes.Join(elements, []byte(",")), []byte("]"))
}

// links names the pages beside this one (RFC 8288).
func links(page, total int) string {
	last := max(1, (total+pageSize-1)/pageSize)
	link := func(page int, relation string) string {
		return "</ideas?page=" + strconv.Itoa(page) + `>; rel="` + relation + `"`
	}
	all := link(1, "first")
	if page > 1 {
		all += ", " + link(min(page-1, last), "prev")
	}
	if page < last {
		all += ", " + link(page+1, "next")
	}
	return all + ", " + link(last, "last")
}

// updateIdea answers PUT /ideas/{id}.
func (s *server) updateIdea(w http.ResponseWriter, r *http.Request, u user) error {
	i, err := readIdea(r)
	if err != nil {
		return err
	}
	old, err := s.store.idea(u.ID, r.PathValue("id"))
	if err != nil {
		return err
	}
	i.ID, i.Owner, i.Created = old.ID, old.Owner, old.Created
	if err := i.seal(); err != nil {
		return err
	}
	if err := s.store.updateIdea(i); err != nil {
		return err
	}
	writeBody(w, http.StatusOK, i.json)
	return nil
}

// readIdea reads what a client may say of an idea.
func readIdea(r *http.Request) (*idea, error) {
	in := readInput(r)
	i := &idea{
		Content:    in.text("content", maxContent),
		Impact:     in.score("impact"),
		Ease:       in.score("ease"),
		Confidence: in.score("confidence"),
	}
	return i, in.err()
}

const (
	maxContent = 255 // characters
	maxScore   = 10
)

func (in *input) score(name string) int {
	return in.integer(name, maxScore, fmt.Sprintf("must be an integer from 1 to %d", maxScore))
}

// seal makes all that follows from the rest: the average, and the JSON, which
// is then served as often as it is asked for.
func (i *idea) seal() (err error) {
	i.Average = average(i.sum()) / 3
	sealed := *i
	sealed.Owner = ""
	i.json, err = json.Marshal(sealed)
	return err
}

// record is the idea in JSON with its owner, as json.Marshal would make it
// again.
func (i *idea) record() []byte {
	return fmt.Appendf(nil, `%s,"owner":%q}`, i.json[:len(i.json)-1], i.Owner)
}

func (i *idea) sum() int { return i.Impact + i.Ease + i.Confidence }

// byRank orders a pool from the last of the list to the first: the lowest
// average, and of equals the oldest. So a new idea, which is listed on top of
// its equals, comes in near the end, where there is little to move.
func byRank(a, b *idea) int {
	if c := cmp.Compare(a.sum(), b.sum()); c != 0 {
		return c
	}
	return strings.Compare(a.ID, b.ID)
}

// addIdea applies a creation.
func (m *memory) addIdea(i *idea) error {
	_, twice := m.ideas[i.ID]
	_, known := m.users[i.Owner]
	if twice || !known {
		return errContradiction
	}
	if err := i.complete(); err != nil {
		return err
	}
	pool := m.pools[i.Owner]
	at, _ := slices.BinarySearchFunc(pool, i, byRank)
	m.pools[i.Owner] = slices.Insert(pool, at, i)
	m.ideas[i.ID] = i
	m.sawID(i.ID)
	return nil
}

// complete checks and seals an idea that comes from a file.
func (i *idea) complete() error {
	if i.json != nil {
		return nil // it is sealed already
	}
	for _, score := range []int{i.Impact, i.Ease, i.Confidence} {
		if score < 1 || score > maxScore {
			return errContradiction
		}
	}
	if !isID(i.ID) || i.Content == "" {
		return errContradiction
	}
	return i.seal()
}

// replaceIdea applies an update. In the pool only what is between its old rank
// and the new one moves.
func (m *memory) replaceIdea(i *idea) error {
	if err := i.complete(); err != nil {
		return err
	}
	old, err := m.findIdea(i.Owner, i.ID)
	if err != nil {
		return err
	}
	pool := m.pools[i.Owner]
	from, _ := slices.BinarySearchFunc(pool, old, byRank)
	to, _ := slices.BinarySearchFunc(pool, i, byRank)
	if to > from {
		to--
		copy(pool[from:to], pool[from+1:])
	} else {
		copy(pool[to+1:from+1], pool[to:from])
	}
	pool[to] = i
	m.ideas[i.ID] = i
	return nil
}

// removeIdea applies a deletion.
func (m *memory) removeIdea(owner, id string) error {
	i, err := m.findIdea(owner, id)
	if err != nil {
		return err
	}
	delete(m.ideas, id)
	pool := m.pools[owner]
	at, _ := slices.BinarySearchFunc(pool, i, byRank)
	m.pools[owner] = slices.Delete(pool, at, at+1)
	return nil
}

// findIdea does not reveal that an idea is somebody else's.
func (m *memory) findIdea(owner, id string) (*idea, error) {
	if i := m.ideas[id]; i != nil && i.Owner == owner {
		return i, nil
	}
	return nil, errNoIdea
}
