package main

import (
	"bytes"
	"cmp"
	"encoding/json"
	"errors"
	"net/http"
	"net/url"
	"slices"
	"strconv"
	"time"
)

// An idea is what a client gets, and what the store keeps. Once stored it is
// never changed, only replaced, so a reader may use it without a lock.
type idea struct {
	ID         serial  `json:"id"` // nine characters
	Content    string  `json:"content"`
	Impact     int     `json:"impact"`
	Ease       int     `json:"ease"`
	Confidence int     `json:"confidence"`
	Average    average `json:"average_score"`
	Created    int64   `json:"created_at"` // seconds since 1970

	Owner serial `json:"owner,omitempty"` // in the files only
	json  []byte // what the client gets, see seal
}

// An average is always written with a decimal point: 8.0, 6.333333333333333.
type average float64

func (a average) MarshalJSON() ([]byte, error) {
	text := strconv.AppendFloat(nil, float64(a), 'f', -1, 64)
	if !bytes.Contains(text, []byte(".")) {
		text = append(text, ".0"...)
	}
	return text, nil
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
	if err := s.store.commit(change{Create: i}); err != nil {
		return err
	}
	writeBody(w, http.StatusCreated, i.json)
	return nil
}

// deleteIdea answers DELETE /ideas/{id}.
func (s *server) deleteIdea(w http.ResponseWriter, r *http.Request, u user) error {
	i, err := s.store.idea(u.ID, parseSerial(r.PathValue("id")))
	if err != nil {
		return err
	}
	if err := s.store.commit(change{Delete: i}); err != nil {
		return err
	}
	w.WriteHeader(http.StatusNoContent)
	return nil
}

// listIdeas answers GET /ideas with one page.
func (s *server) listIdeas(w http.ResponseWriter, r *http.Request, u user) error {
	page, err := pageOf(r.URL.RawQuery)
	if err != nil {
		return err
	}
	list, total := s.store.pageOfIdeas(u.ID, page)
	w.Header().Set("Link", links(page, total))
	writeBody(w, http.StatusOK, list)
	return nil
}

// pageOf reads the page of a query. What else there is does not matter, unless it
// is broken and may have been a page.
func pageOf(query string) (int, error) {
	values, broken := url.ParseQuery(query)
	if broken == nil && !values.Has("page") {
		return 1, nil
	}
	page, err := strconv.ParseUint(values.Get("page"), 10, strconv.IntSize-1)
	if err != nil || page == 0 || len(values["page"]) > 1 {
		return 0, fieldErrors{"page": "must be an integer above 0"}
	}
	return int(page), nil
}

// links names the pages beside this one (RFC 8288).
func links(page, total int) string {
	last := max(1, pagesFor(total))
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
	old, err := s.store.idea(u.ID, parseSerial(r.PathValue("id")))
	if err != nil {
		return err
	}
	i.ID, i.Owner, i.Created = old.ID, old.Owner, old.Created
	if err := i.seal(); err != nil {
		return err
	}
	if err := s.store.commit(change{Update: i}); err != nil {
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
		Impact:     in.integer("impact", maxScore),
		Ease:       in.integer("ease", maxScore),
		Confidence: in.integer("confidence", maxScore),
	}
	return i, in.err()
}

const (
	maxContent = 255 // characters
	maxScore   = 10
)

// seal checks an idea, from a client or a file, and makes all that follows from
// the rest: the average, and the JSON, which is then served as often as it is
// asked for.
func (i *idea) seal() (err error) {
	if i.json != nil {
		return nil // it is sealed already
	}
	scores := i.scores()
	if i.ID == 0 || i.Content == "" || slices.Min(scores) < 1 || slices.Max(scores) > maxScore {
		return errContradiction
	}
	i.Average = average(i.sum()) / average(len(scores))
	sealed := *i
	sealed.Owner = 0
	i.json, err = json.Marshal(sealed)
	return err
}

func (i *idea) scores() []int { return []int{i.Impact, i.Ease, i.Confidence} }

func (i *idea) sum() (sum int) {
	for _, score := range i.scores() {
		sum += score
	}
	return sum
}

// record is what a snapshot has of an idea: the same as json.Marshal would
// make, without making it again.
func (i *idea) record() []byte {
	return slices.Concat(i.json[:len(i.json)-1], []byte(`,"owner":"`+i.Owner.String()+`"}`))
}

// A pool is the ideas of one user, by the sum of their scores, which orders them
// as the average does. Only equals have to be kept in order, the oldest first: a
// new idea comes in at their end.
type pool [][]*idea

// add returns the pool, which may have grown, as append does.
func (p pool) add(i *idea) pool {
	if missing := i.sum() + 1 - len(p); missing > 0 {
		p = append(p, make(pool, missing)...)
	}
	equals := p[i.sum()]
	p[i.sum()] = slices.Insert(equals, find(equals, i), i)
	return p
}

func (p pool) remove(i *idea) {
	equals := p[i.sum()]
	at := find(equals, i)
	p[i.sum()] = slices.Delete(equals, at, at+1)
}

func (p pool) replace(old, i *idea) pool {
	if equals := p[old.sum()]; i.sum() == old.sum() {
		equals[find(equals, old)] = i
		return p
	}
	p.remove(old)
	return p.add(i)
}

// find returns where among its equals i is, or would be.
func find(equals []*idea, i *idea) (at int) {
	at, _ = slices.BinarySearchFunc(equals, i.ID, func(equal *idea, id serial) int { return cmp.Compare(equal.ID, id) })
	return at
}

// page returns a page of the list, in JSON, and the number of all ideas. The
// list begins with the highest average, and of equals with the newest.
func (p pool) page(number int) (list []byte, total int) {
	for _, equals := range p {
		total += len(equals)
	}
	if number > pagesFor(total) {
		return []byte("[]"), total
	}
	list = append(make([]byte, 0, pageSize*200), '[') // most pages have room
	skip, missing := (number-1)*pageSize, pageSize
	for _, equals := range slices.Backward(p) {
		rest := equals[:max(0, len(equals)-skip)]
		skip -= len(equals) - len(rest)
		rest = rest[max(0, len(rest)-missing):]
		missing -= len(rest)
		for _, i := range slices.Backward(rest) {
			list = append(append(list, i.json...), ',')
		}
	}
	list[len(list)-1] = ']' // in the place of the last comma
	return list, total
}

func pagesFor(ideas int) int { return (ideas + pageSize - 1) / pageSize }

// addIdea applies a creation.
func (m *memory) addIdea(i *idea) error {
	_, twice := m.ideas[i.ID]
	_, known := m.users[i.Owner]
	if twice || !known {
		return errContradiction
	}
	if err := i.seal(); err != nil {
		return err
	}
	m.pools[i.Owner] = m.pools[i.Owner].add(i)
	m.ideas[i.ID] = i
	m.lastID = max(m.lastID, i.ID)
	return nil
}

// replaceIdea applies an update.
func (m *memory) replaceIdea(i *idea) error {
	if err := i.seal(); err != nil {
		return err
	}
	old, err := m.findIdea(i.Owner, i.ID)
	if err != nil {
		return err
	}
	m.pools[i.Owner] = m.pools[i.Owner].replace(old, i)
	m.ideas[i.ID] = i
	return nil
}

// removeIdea applies a deletion.
func (m *memory) removeIdea(owner, id serial) error {
	i, err := m.findIdea(owner, id)
	if err != nil {
		return err
	}
	m.pools[owner].remove(i)
	delete(m.ideas, id)
	return nil
}

// findIdea does not reveal that an idea is somebody else's.
func (m *memory) findIdea(owner, id serial) (*idea, error) {
	if i := m.ideas[id]; i != nil && i.Owner == owner {
		return i, nil
	}
	return nil, errNoIdea
}
