package main

import (
	"bufio"
	"bytes"
	"cmp"
	"crypto/rand"
	"encoding/json"
	"errors"
	"fmt"
	"hash/crc32"
	"io"
	"io/fs"
	"log/slog"
	"maps"
	"os"
	"path/filepath"
	"runtime"
	"runtime/debug"
	"slices"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"time"
)

// A store promises that a change which was answered with success is on disk,
// whatever happens a moment later. It keeps
//
//	FILE                   the snapshot: all there was when it was written
//	FILE.journal.00000008  the changes since, one line an fsync; FILE names it
//	FILE.lock              held by the one process that may use them
//
// A change is (1) written to the journal, (2) fsynced, (3) applied to memory
// and (4) answered. So nobody sees what a crash could take back, there is
// nothing to undo, and recovery, which applies the same changes in the same
// order, gives the same result. Everything unusual is one operation, renew
// (elsewhere called compaction): begin the next journal, write a snapshot that
// names it, remove the older journals.
//
// Locks are taken in the order renewing, diskMu, then queueMu or mu.
type store struct {
	// mu guards memory, and is never held during I/O. To apply takes diskMu, too:
	// who holds that may read all but lastID.
	mu sync.RWMutex
	memory

	queueMu sync.Mutex
	queue   []*pending // for its first, who waits for diskMu

	diskMu    sync.Mutex // to write the journal
	journal   *os.File
	number    uint64    // of the journal
	size      int64     // of what is acknowledged in it
	sum       uint32    // of what is acknowledged in it
	limit     int64     // the size at which to renew
	base      uint64    // the journal that FILE names
	abandoned uint64    // the last journal that must not be written any more, or 0
	nextRenew time.Time // none before that

	renewing sync.Mutex  // held by the one renew there may be
	failing  atomic.Bool // the last change could not be stored

	torn bool   // a last line was dropped at the start
	path string // of FILE; "" keeps everything in memory only
	id   string // in every checksum: keeps the files of another store out
	lock *os.File
	disk disk
	log  *slog.Logger
}

// memory is all that is kept, by what it is looked up by.
type memory struct {
	users    map[serial]user     // by id
	emails   map[string]serial   // user id by e-mail in lower case
	sessions map[string]session  // by key
	logIns   map[serial][]string // session keys by user id, oldest first
	ideas    map[serial]*idea    // by id
	pools    map[serial]pool     // by user id
	lastID   serial
}

// A change is one thing that happened, as the journal has it: with its
// results, such as ids, times and hashes, and not with what they were made of.
// One member is set, and for a sign-up two.
type change struct {
	User    *user    `json:"user,omitempty"`    // signed up, and logged in
	Session *session `json:"session,omitempty"` // logged in
	LogOut  *session `json:"logout,omitempty"`  // logged out
	Create  *idea    `json:"create,omitempty"`
	Update  *idea    `json:"update,omitempty"`
	Delete  *idea    `json:"delete,omitempty"`
	Probe   string   `json:"probe,omitempty"` // nothing happened, see check
}

var (
	errNotStored     = errors.New("nothing can be stored just now; try again in a moment")
	errContradiction = errors.New("cannot be right")
)

// What the handlers ask for:

func (s *store) user(id serial) (user, bool) {
	s.mu.RLock()
	defer s.mu.RUnlock()
	u, ok := s.users[id]
	return u, ok
}

func (s *store) userByEmail(email string) (user, bool) {
	s.mu.RLock()
	defer s.mu.RUnlock()
	u, ok := s.users[s.emails[strings.ToLower(email)]]
	return u, ok
}

// session returns the session with a key, and its user.
func (s *store) session(key string) (session, user, bool) {
	s.mu.RLock()
	defer s.mu.RUnlock()
	session, ok := s.sessions[key]
	return session, s.users[session.UserID], ok
}

func (s *store) idea(owner, id serial) (*idea, error) {
	s.mu.RLock()
	defer s.mu.RUnlock()
	return s.findIdea(owner, id)
}

// pageOfIdeas returns a page of the list, in JSON, and the number of all ideas.
func (s *store) pageOfIdeas(owner serial, page int) (list []byte, total int) {
	s.mu.RLock()
	defer s.mu.RUnlock()
	return s.pools[owner].page(page)
}

// check returns errNotStored if the last change could not be stored, and still
// nothing can. It tries, for there may be no other change that would show it, and
// with more than any other takes.
func (s *store) check() error {
	if s.failing.Load() {
		return s.commit(change{Probe: strings.Repeat("-", 4<<10)})
	}
	return nil
}

// newID returns an id that is higher than all before it.
func (s *store) newID() serial {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.lastID = max(s.lastID+1, serial(time.Now().UnixMicro()/100), minSerial)
	return s.lastID
}

// A serial is the id of a user or an idea: tenths of milliseconds since 1970,
// written as nine characters in base 36.
type serial uint64

// minSerial is the first of nine characters, of 1978; the last is of 2291.
const minSerial = 36 * 36 * 36 * 36 * 36 * 36 * 36 * 36

func (id serial) String() string { return strconv.FormatUint(uint64(id), 36) }

// parseSerial returns 0, the id of nothing, for what is not nine characters as
// String writes them.
func parseSerial(text string) serial {
	n, _ := strconv.ParseUint(text, 36, 64)
	if id := serial(n); len(text) == 9 && id.String() == text {
		return id
	}
	return 0
}

func (id serial) MarshalText() ([]byte, error) { return strconv.AppendUint(nil, uint64(id), 36), nil }

func (id *serial) UnmarshalText(text []byte) error {
	if *id = parseSerial(string(text)); *id == 0 {
		return fmt.Errorf("the id %q %w", text, errContradiction)
	}
	return nil
}

// How a change is made:

// A pending change is on its way to the disk.
type pending struct {
	change
	text []byte     // its record
	done chan error // gets what came of it
}

// commit stores a change, applies it, and returns what came of it: errNotStored
// if the disk fails, errEmailTaken to all but one of those who sign up with the
// same e-mail, errNoIdea if the idea is gone by now. Changes that come at the
// same time share an fsync: the first of a queue waits for the disk, and stores
// all who have joined by then.
func (s *store) commit(c change) error {
	text, err := c.record()
	if err != nil {
		return err
	}
	mine := &pending{change: c, text: text, done: make(chan error, 1)}
	s.queueMu.Lock()
	s.queue = append(s.queue, mine)
	first := len(s.queue) == 1
	s.queueMu.Unlock()
	if first {
		s.commitQueue()
	}
	return <-mine.done
}

// record is a change in the journal. Of an idea there is the JSON already.
func (c change) record() ([]byte, error) {
	switch {
	case c.Create != nil:
		return slices.Concat([]byte(`{"create":`), c.Create.record(), []byte("}")), nil
	case c.Update != nil:
		return slices.Concat([]byte(`{"update":`), c.Update.record(), []byte("}")), nil
	}
	return json.Marshal(c)
}

// commitQueue makes the changes in the queue durable and then visible.
func (s *store) commitQueue() {
	s.diskMu.Lock()
	defer s.diskMu.Unlock()
	queue := s.takeQueue()
	err := s.appendToJournal(queue)

	s.mu.Lock()
	defer s.mu.Unlock()
	for _, p := range queue {
		if err != nil {
			p.done <- err
		} else {
			p.done <- s.apply(p.change)
		}
	}
}

// takeQueue lets others join for as long as some do, as an fsync costs the same
// for all of them as for one.
func (s *store) takeQueue() []*pending {
	for joined := 0; ; runtime.Gosched() {
		s.queueMu.Lock()
		queue := s.queue
		if len(queue) == joined {
			s.queue = nil
			s.queueMu.Unlock()
			return queue
		}
		joined = len(queue)
		s.queueMu.Unlock()
	}
}

// apply makes a change in memory, at work as in recovery. It decides who loses a
// race: the loser's change is in the journal, and has no effect.
func (m *memory) apply(c change) error {
	switch {
	case c.User != nil && c.Session == nil:
		return errContradiction
	case c.User != nil:
		if err := m.addUser(*c.User); err != nil {
			return err
		}
		return m.addSession(*c.Session)
	case c.Session != nil:
		return m.addSession(*c.Session)
	case c.LogOut != nil:
		m.removeSession(c.LogOut.UserID, c.LogOut.Key)
	case c.Create != nil:
		return m.addIdea(c.Create)
	case c.Update != nil:
		return m.replaceIdea(c.Update)
	case c.Delete != nil:
		return m.removeIdea(c.Delete.Owner, c.Delete.ID)
	}
	return nil
}

// appendToJournal returns once the changes are on disk, or errNotStored if they
// cannot get there.
func (s *store) appendToJournal(queue []*pending) error {
	if s.path == "" {
		return nil
	}
	if s.abandoned >= s.base { // FILE still needs a journal that cannot go on
		s.renewInBackground()
		return errNotStored
	}
	line, sum := encodeLine(s.sum, queue)
	err := s.writeLine(line)
	s.logHealth(err)
	if err != nil {
		return errNotStored
	}
	s.size, s.sum = s.size+int64(len(line)), sum
	if s.size > s.limit {
		s.renewInBackground()
	}
	return nil
}

// logHealth logs the first of many failures, and their end.
func (s *store) logHealth(err error) {
	switch failed := s.failing.Swap(err != nil); {
	case err != nil && !failed:
		s.log.Error("nothing can be stored", "error", err)
	case err == nil && failed:
		s.log.Warn("changes can be stored again")
	}
}

// writeLine puts a line behind what is acknowledged, or cuts the journal back
// to that. After a failed fsync the kernel may believe that the lost pages are
// written (PostgreSQL's "fsyncgate"): then, or if it cannot be cut, this
// journal is not written again.
func (s *store) writeLine(line []byte) error {
	name := s.journal.Name()
	err := s.disk.do("write", name, func() error {
		_, err := s.journal.WriteAt(line, s.size)
		return err
	})
	if err == nil {
		if err = s.disk.do("sync", name, s.journal.Sync); err == nil {
			return nil
		}
		s.abandoned = s.number
	}
	cut := func() error { return errors.Join(s.journal.Truncate(s.size), s.journal.Sync()) }
	if s.disk.do("truncate", name, cut) != nil {
		s.abandoned = s.number
	}
	return err
}

// encodeLine makes a line of the journal: the checksum of all lines so far, so
// that none can be missing or in another place, a blank, and the changes.
func encodeLine(sum uint32, queue []*pending) ([]byte, uint32) {
	list := []byte("[")
	for _, p := range queue {
		list = append(append(list, p.text...), ',')
	}
	list[len(list)-1] = ']' // in the place of the last comma
	sum = crc32.Update(sum, castagnoli(), list)
	return fmt.Appendf(nil, "%08x %s\n", sum, list), sum
}

func castagnoli() *crc32.Table { return crc32.MakeTable(crc32.Castagnoli) }

// firstSum is the checksum before the first line of a journal.
func (s *store) firstSum(number uint64) uint32 {
	return crc32.Checksum(fmt.Append(nil, s.id, number), castagnoli())
}

func (s *store) journalPath(number uint64) string {
	return fmt.Sprintf("%s.journal.%08d", s.path, number)
}

// How the store moves to new files:

// limitAfter is the size of a journal, in bytes, that is worth a new snapshot.
// With twice the old one, what is written for an idea is less than 400 bytes in
// all; with once, it came to 450.
func limitAfter(snapshot int64) int64 { return max(minLimit, 2*snapshot) }

const minLimit = 1 << 20

// renewInBackground renews while reads and, if they can, changes go on, at most
// once a second. The caller holds diskMu.
func (s *store) renewInBackground() {
	if time.Now().Before(s.nextRenew) || !s.renewing.TryLock() {
		return
	}
	s.nextRenew = time.Now().Add(time.Second)
	go func() {
		defer s.renewing.Unlock()
		if err := s.renew(); err != nil {
			s.log.Error("cannot renew the files", "error", err)
			s.diskMu.Lock()
			s.limit = s.size + minLimit // each try makes a journal
			s.diskMu.Unlock()
		}
	}()
}

// renew moves the store to the next journal and a new snapshot. A crash
// between any two steps leaves a snapshot and all journals from the one that
// it names. The caller holds renewing.
func (s *store) renew() error {
	s.diskMu.Lock()
	image, err := s.nextJournal()
	s.diskMu.Unlock()
	if err != nil {
		return err
	}
	if err := s.disk.replace(s.path, image.encode); err != nil {
		return err
	}
	info, err := os.Stat(s.path)
	if err != nil {
		return err
	}
	s.diskMu.Lock()
	s.base, s.limit = image.Journal, limitAfter(info.Size())
	s.diskMu.Unlock()
	return s.removeJournals(image.Journal)
}

// nextJournal begins a journal, unless there is an empty one to go on with,
// and returns an image of memory at that point. The caller holds diskMu, so
// that nothing is applied meanwhile.
func (s *store) nextJournal() (*snapshot, error) {
	if s.journal == nil || s.size > 0 || s.abandoned == s.number {
		path := s.journalPath(s.number + 1)
		f, err := s.disk.create(path)
		if err == nil {
			err = s.disk.syncFolder(path)
		}
		if err != nil {
			f.Close() // or nothing, where it is nil
			return nil, err
		}
		s.journal.Close() // likewise
		s.journal, s.number, s.size = f, s.number+1, 0
		s.sum = s.firstSum(s.number)
	}
	return s.image(), nil
}

// image returns what a snapshot is to hold. It takes references only: what they
// refer to is replaced, not changed.
func (s *store) image() *snapshot {
	image := &snapshot{Format: 1, Store: s.id, Journal: s.number, Users: slices.Collect(maps.Values(s.users))}
	s.mu.RLock() // newID changes it without diskMu
	image.LastID = uint64(s.lastID)
	s.mu.RUnlock()
	for _, keys := range s.logIns {
		for _, key := range keys {
			image.Sessions = append(image.Sessions, s.sessions[key])
		}
	}
	image.Ideas = make([]*idea, 0, len(s.ideas))
	for _, pool := range s.pools {
		for _, equals := range pool {
			image.Ideas = append(image.Ideas, equals...)
		}
	}
	return image
}

// removeJournals removes those before a number.
func (s *store) removeJournals(before uint64) error {
	numbers, err := s.journals()
	for _, n := range numbers {
		if n < before && err == nil {
			path := s.journalPath(n)
			err = s.disk.do("remove", path, func() error { return os.Remove(path) })
		}
	}
	return err
}

// journals returns the numbers of those that there are.
func (s *store) journals() (numbers []uint64, err error) {
	entries, err := os.ReadDir(filepath.Dir(s.path))
	for _, e := range entries {
		n, _ := strconv.ParseUint(strings.TrimPrefix(filepath.Ext(e.Name()), "."), 10, 64)
		if e.Name() == filepath.Base(s.journalPath(n)) {
			numbers = append(numbers, n)
		}
	}
	return numbers, err
}

// A snapshot is what FILE holds.
type snapshot struct {
	Format   int       `json:"format"`
	Store    string    `json:"store"`
	Journal  uint64    `json:"journal"` // the one that continues it
	LastID   uint64    `json:"last_id"` // a serial, which may be of something deleted
	Users    []user    `json:"users"`
	Sessions []session `json:"sessions"`
	Ideas    []*idea   `json:"ideas"`
	CRC32C   string    `json:"crc32c"` // of all before it; whoever edits FILE removes it
}

const sumMember = ",\n\"crc32c\":"

// encode writes the snapshot piece by piece: as a whole it would take as much
// memory again as all there is.
func (image *snapshot) encode(w io.Writer) error {
	sum := crc32.New(castagnoli())
	summed := io.MultiWriter(w, sum)
	id, err := json.Marshal(image.Store)
	fmt.Fprintf(summed, `{"format":%d,"store":%s,"journal":%d,"last_id":%d`, image.Format, id, image.Journal, image.LastID)
	err = errors.Join(err,
		encodeList(summed, "users", image.Users, json.Marshal),
		encodeList(summed, "sessions", image.Sessions, json.Marshal),
		encodeList(summed, "ideas", image.Ideas, func(i any) ([]byte, error) { return i.(*idea).record(), nil }))
	fmt.Fprintf(w, "%s\"%08x\"}\n", sumMember, sum.Sum32())
	return err
}

// encodeList writes a member of an object, a line for each of its elements.
func encodeList[T any](w io.Writer, name string, list []T, encode func(any) ([]byte, error)) error {
	fmt.Fprintf(w, ",\n%q:[", name)
	separator := "\n"
	for _, element := range list {
		text, err := encode(element)
		if err != nil {
			return err
		}
		io.WriteString(w, separator)
		w.Write(text)
		separator = ",\n"
	}
	_, err := io.WriteString(w, "]") // w is buffered, and returns its first error again
	return err
}

// How the store comes back:

// openStore reads FILE and its journals, and changes neither. With no path, or
// no FILE, the store is empty.
func openStore(path string, log *slog.Logger) (*store, error) {
	s := &store{log: log, id: rand.Text(), memory: memory{
		users:    make(map[serial]user),
		emails:   make(map[string]serial),
		sessions: make(map[string]session),
		logIns:   make(map[serial][]string),
		ideas:    make(map[serial]*idea),
		pools:    make(map[serial]pool),
	}}
	if path == "" {
		return s, nil
	}
	var err error
	if s.path, err = realPath(path); err != nil {
		return nil, err
	}
	if s.lock, err = os.OpenFile(s.path+".lock", os.O_RDWR|os.O_CREATE, 0o600); err != nil {
		return nil, err
	}
	if err := lock(s.lock); err != nil {
		s.lock.Close()
		return nil, fmt.Errorf("%s is held by another process: %w", s.lock.Name(), err)
	}
	if err := s.recover(); err != nil {
		s.lock.Close()
		return nil, err
	}
	return s, nil
}

// realPath resolves symbolic links: an alias must not get a lock of its own.
func realPath(path string) (string, error) {
	folder, err := filepath.EvalSymlinks(filepath.Dir(path))
	if err != nil {
		return "", err
	}
	if _, err := os.Lstat(path); errors.Is(err, fs.ErrNotExist) {
		return filepath.Join(folder, filepath.Base(path)), nil
	}
	return filepath.EvalSymlinks(path)
}

// recover reads the snapshot, and every journal from the one that it names.
func (s *store) recover() error {
	if err := s.readSnapshot(); err != nil {
		return fmt.Errorf("%s: %w", s.path, err)
	}
	numbers, err := s.journals()
	if err != nil {
		return err
	}
	s.number = slices.Max(append(numbers, s.base))
	first := cmp.Or(s.base, slices.Min(append(numbers, s.number)))
	for number := first; number <= s.number; number++ {
		if err := s.replay(number); err != nil {
			return err
		}
	}
	return nil
}

// readSnapshot reads FILE, if there is one. It refuses what contradicts itself,
// and what a newer program may have written.
func (s *store) readSnapshot() error {
	data, err := os.ReadFile(s.path)
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	} else if err != nil {
		return err
	}
	var image snapshot
	dec := json.NewDecoder(bytes.NewReader(data))
	dec.DisallowUnknownFields() // of a newer ideapool, or mistyped by hand
	err = dec.Decode(&image)
	if _, end := dec.Token(); err == nil && end != io.EOF {
		err = errors.New("something follows the object")
	}
	switch {
	case image.Format > 1:
		return fmt.Errorf("has format %d, of a newer ideapool", image.Format)
	case err != nil:
		return fmt.Errorf("is damaged: %w", err)
	case image.Format != 1:
		return errors.New("is not a file of ideapool")
	case image.CRC32C != "" && image.CRC32C != sumOf(data):
		return errors.New("is damaged: the checksum does not match")
	}
	s.base, s.id = image.Journal, cmp.Or(image.Store, s.id)
	s.limit = limitAfter(int64(len(data)))
	return s.load(&image)
}

func sumOf(data []byte) string {
	summed := data[:max(0, bytes.LastIndex(data, []byte(sumMember)))]
	return fmt.Sprintf("%08x", crc32.Checksum(summed, castagnoli()))
}

// load takes over a snapshot. Anything impossible in it is damage.
func (m *memory) load(image *snapshot) error {
	for _, u := range image.Users {
		if err := m.addUser(u); err != nil {
			return fmt.Errorf("user %q: %w", u.ID, err)
		}
	}
	for _, session := range image.Sessions {
		if err := m.addSession(session); err != nil {
			return fmt.Errorf("session %q: %w", session.Key, err)
		}
	}
	m.lastID = max(m.lastID, serial(image.LastID))
	m.ideas = make(map[serial]*idea, len(image.Ideas))
	if slices.Contains(image.Ideas, nil) {
		return fmt.Errorf("an idea %w", errContradiction)
	}
	sealAll(image.Ideas)
	for _, i := range image.Ideas {
		if err := m.addIdea(i); err != nil {
			return fmt.Errorf("idea %q: %w", i.ID, err)
		}
	}
	if m.lastID >= 35*minSerial { // there must be room for more of nine characters
		return fmt.Errorf("an id after %q: %w", serial(35*minSerial), errContradiction)
	}
	return nil
}

// sealAll does on all cores what addIdea does for those that are not sealed.
func sealAll(ideas []*idea) {
	var batches sync.WaitGroup
	for batch := range slices.Chunk(ideas, 1000) {
		batches.Go(func() {
			for _, i := range batch {
				i.seal() // addIdea meets any error again
			}
		})
	}
	batches.Wait()
}

// replay applies a journal. Its last line may be torn; one that no later change
// follows is taken for one that was never acknowledged.
func (s *store) replay(number uint64) error {
	path := s.journalPath(number)
	data, err := os.ReadFile(path)
	switch {
	case s.base == 0 && errors.Is(err, fs.ErrNotExist):
		return nil // there is no FILE, which would name it
	case err != nil || len(data) == 0:
		return err
	case s.base == 0:
		return fmt.Errorf("%s holds changes, but %s does not name it", path, s.path)
	case s.torn:
		return fmt.Errorf("%s goes on where the journal before it is torn", path)
	}
	s.size += int64(len(data))
	sum := s.firstSum(number)
	for line := 1; len(data) > 0; line++ {
		text, rest, whole := bytes.Cut(data, []byte("\n"))
		if s.torn = len(rest) == 0 && (!whole || hasLostBlock(text)); s.torn {
			s.log.Warn("dropped a last line that was never acknowledged", "file", path, "line", line, "bytes", len(data))
			return nil
		}
		if sum, err = s.replayLine(text, sum); err != nil {
			return fmt.Errorf("%s:%d: %w", path, line, err)
		}
		data = rest
	}
	return nil
}

// hasLostBlock guesses whether a part of the line never reached the disk: there
// are zeros in its place, which JSON does not have. A single one within is a
// flipped bit.
func hasLostBlock(line []byte) bool {
	return bytes.HasPrefix(line, []byte{0}) || bytes.Contains(line, []byte{0, 0})
}

func (s *store) replayLine(line []byte, sum uint32) (uint32, error) {
	head, list, _ := bytes.Cut(line, []byte(" "))
	sum = crc32.Update(sum, castagnoli(), list)
	if string(head) != fmt.Sprintf("%08x", sum) {
		return 0, errors.New("is damaged: the checksum does not match")
	}
	var changes []change
	dec := json.NewDecoder(bytes.NewReader(list))
	dec.DisallowUnknownFields() // of a newer ideapool
	if err := dec.Decode(&changes); err != nil {
		return 0, err
	}
	for _, c := range changes {
		err := s.apply(c)
		if err != nil && !errors.Is(err, errEmailTaken) && !errors.Is(err, errNoIdea) {
			return 0, err
		}
	}
	return sum, nil
}

// start makes the store ready for changes. After a clean close there is only
// an empty journal to open.
func (s *store) start() (err error) {
	if s.path == "" {
		return nil
	}
	defer func() { go debug.FreeOSMemory() }() // recovery leaves much garbage
	s.renewing.Lock()
	defer s.renewing.Unlock()
	if s.base == 0 || s.number > s.base || s.size > 0 {
		return s.renew()
	}
	s.sum = s.firstSum(s.base)
	s.journal, err = os.OpenFile(s.journalPath(s.base), os.O_RDWR, 0)
	return err
}

// close leaves everything in FILE, with an empty journal. The store cannot be
// used any more.
func (s *store) close() (err error) {
	if s.path == "" {
		return nil
	}
	s.renewing.Lock() // for ever: whoever is late must not touch the files
	if s.journal != nil {
		err = errors.Join(s.renew(), s.journal.Close())
	}
	return errors.Join(err, s.lock.Close())
}

// A disk runs each operation that the promise hangs on. It is nil but in tests,
// which let the n-th one fail.
type disk func(op, path string, do func() error) error

func (d disk) do(op, path string, do func() error) error {
	if d == nil {
		return do()
	}
	return d(op, path, do)
}

// create makes an empty file that only its owner can read.
func (d disk) create(path string) (f *os.File, err error) {
	err = d.do("create", path, func() error {
		if f, err = os.OpenFile(path, os.O_RDWR|os.O_CREATE|os.O_TRUNC, 0o600); err != nil {
			return err
		}
		return f.Chmod(0o600) // an older one may be open to others
	})
	return f, err
}

// replace gives a file new content; a crash leaves the old or the new.
func (d disk) replace(path string, content func(io.Writer) error) error {
	temp := path + ".tmp"
	f, err := d.create(temp)
	if err != nil {
		return err
	}
	defer os.Remove(temp) // where it was not renamed
	err = d.do("write", temp, func() error {
		buffer := bufio.NewWriterSize(f, 1<<16)
		return errors.Join(content(buffer), buffer.Flush())
	})
	if err == nil {
		err = d.do("sync", temp, f.Sync)
	}
	if err = errors.Join(err, f.Close()); err == nil { // closed: Windows renames no open file
		err = d.do("rename", path, func() error { return os.Rename(temp, path) })
	}
	if err != nil {
		return err
	}
	return d.syncFolder(path)
}

// syncFolder makes durable that a file has come or gone by a name.
func (d disk) syncFolder(path string) error {
	if runtime.GOOS == "windows" {
		return nil // a folder cannot be synced there
	}
	f, err := os.Open(filepath.Dir(path))
	if err != nil {
		return err
	}
	defer f.Close()
	return d.do("sync", f.Name(), f.Sync)
}
