package main

import (
	"bufio"
	"bytes"
	"cmp"
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
	"regexp"
	"runtime"
	"runtime/debug"
	"slices"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"time"
)

// A store keeps everything in memory, where it is read, and in one file, FILE.
// A change is first appended to FILE, then fsynced, then applied to memory, and
// then acknowledged. So nobody sees a change that a crash could still lose,
// nothing ever has to be undone, and a start, which applies the same changes in
// the same order, ends with the same memory.
//
// Locks are acquired in this order: compacting, fileMu, then queueMu or mu.
type store struct {
	// mu guards memory and is never held during I/O. Changes are applied with fileMu
	// held as well, so the holder of fileMu may read everything except lastID
	// without mu.
	mu sync.RWMutex
	memory

	queueMu sync.Mutex
	queue   []*pendingChange

	fileMu         sync.Mutex // held to write FILE
	journal        *journal   // nil if everything is kept in memory only
	collecting     bool       // a compaction is running
	collected      [][]byte   // the changes since it began, in JSON
	lastCompaction time.Time  // when it began, in the background
	compactFailed  bool       // the last compaction failed
	closed         bool

	compacting sync.Mutex  // held by the one compaction that may run
	failing    atomic.Bool // the last change could not be saved

	path   string // FILE
	torn   int    // the number of an incomplete last line that was dropped at the start
	lock   *os.File
	disk   disk
	logger *slog.Logger
}

// memory holds all data, indexed the way it is looked up.
type memory struct {
	accounts  map[string]*account    // by user id
	emails    map[string]*account    // by e-mail in lower case
	sessions  map[string]*session    // by key
	ideas     map[string]*storedIdea // by id
	loggedOut map[tokenID]struct{}   // access tokens
	lastID    uint64                 // the highest id so far; see newID
	loading   bool                   // see sortLists
}

// An account is a user and what belongs to them.
type account struct {
	user     user
	sessions []*session // oldest first
	ideas    ideaList
}

// A change is one thing that happened, stored with its results, such as
// ids, times and hashes. One member is set, and for a sign-up two.
type change struct {
	User    *user       `json:"user,omitempty"`    // signed up
	Session *session    `json:"session,omitempty"` // logged in
	Logout  *logout     `json:"logout,omitempty"`
	Create  *storedIdea `json:"create,omitempty"`
	Update  *storedIdea `json:"update,omitempty"`
	Delete  *ideaKey    `json:"delete,omitempty"`
	Probe   string      `json:"probe,omitempty"` // nothing happened; see check

	line int // of FILE, at startup
}

var (
	errNotSaved     = errors.New("cannot save changes right now; please try again")
	errInconsistent = errors.New("invalid, or contradicts earlier changes")
	errLocked       = errors.New("in use by another process; stop that process first")
)

func newMemory() memory {
	return memory{
		accounts:  make(map[string]*account),
		emails:    make(map[string]*account),
		sessions:  make(map[string]*session),
		ideas:     make(map[string]*storedIdea),
		loggedOut: make(map[tokenID]struct{}),
	}
}

// check returns errNotSaved if changes cannot be saved. After a failure it tries
// again, with a probe that is larger than any real change: JSON takes up to six
// bytes for a byte of a request.
func (s *store) check() error {
	if s.failing.Load() {
		return s.commit(change{Probe: strings.Repeat("-", 6*maxBody)})
	}
	return nil
}

// newID returns an id that is higher than all before it: units of 100 µs since
// 1970, in base 36, which takes nine characters from 1978 to 2291.
func (s *store) newID() string {
	const first = 36 * 36 * 36 * 36 * 36 * 36 * 36 * 36
	s.mu.Lock()
	defer s.mu.Unlock()
	s.lastID = max(s.lastID+1, uint64(time.Now().UnixMicro()/100), first)
	return strconv.FormatUint(s.lastID, 36)
}

// idShape matches every id. loadEdited makes sure that there is room for new ones.
var idShape = regexp.MustCompile(`^[1-9a-y][0-9a-z]{8}$`)

// usedID makes sure that newID returns higher ids from now on.
func (m *memory) usedID(id string) {
	n, _ := strconv.ParseUint(id, 36, 64)
	m.lastID = max(m.lastID, n)
}

// A pendingChange waits to be written.
type pendingChange struct {
	change
	json []byte
	done chan error // receives the result
}

// commit saves a change, applies it, and returns the result: errNotSaved if the
// disk fails, errEmailTaken for all but one of the concurrent sign-ups with the
// same e-mail, errNoIdea if the idea is gone by now. The first change in the
// queue triggers writing of the whole queue, so changes share an fsync.
func (s *store) commit(c change) error {
	p := &pendingChange{change: c, json: c.appendJSON(nil), done: make(chan error, 1)}
	s.queueMu.Lock()
	s.queue = append(s.queue, p)
	first := len(s.queue) == 1
	s.queueMu.Unlock()
	if first {
		// A panic in a separate goroutine ends the process. In a handler's,
		// net/http would recover it and go on with half-changed memory.
		go s.commitQueue()
	}
	return <-p.done
}

// appendJSON appends the change as FILE has it. The JSON of an idea exists
// already. (%q writes Go syntax, which is JSON for the letters and digits of an id.)
func (c change) appendJSON(b []byte) []byte {
	switch {
	case c.Create != nil:
		return fmt.Appendf(b, `{"create":{"owner":%q,"idea":%s}}`, c.Create.Owner, c.Create.json)
	case c.Update != nil:
		return fmt.Appendf(b, `{"update":{"owner":%q,"idea":%s}}`, c.Update.Owner, c.Update.json)
	}
	text, _ := json.Marshal(c) // never fails: it is text and numbers
	return append(b, text...)
}

func (s *store) commitQueue() {
	s.fileMu.Lock()
	queue := s.takeQueue()
	err := s.write(queue)
	failedBefore := s.failing.Swap(err != nil) // before anyone hears of the result
	s.finish(queue, err)
	s.fileMu.Unlock()
	s.logHealth(failedBefore, err)
}

// takeQueue waits while other changes are still arriving, as an fsync costs the
// same for one change as for all.
func (s *store) takeQueue() []*pendingChange {
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

// write returns nil once the changes are on disk. The caller holds fileMu.
func (s *store) write(queue []*pendingChange) error {
	if s.journal == nil {
		return nil
	}
	changes := make([][]byte, len(queue))
	for n, p := range queue {
		changes[n] = p.json
	}
	err := errNotSaved
	if !s.journal.broken && !s.closed {
		err = s.journal.append(changes)
	}
	if err == nil && s.collecting {
		s.collected = append(s.collected, changes...)
	}
	if s.journal.broken || s.journal.count > 1000+2*s.size() {
		s.compactInBackground()
	}
	return err
}

// finish applies the changes, unless they could not be written, and reports the
// result to those who wait. The caller holds fileMu.
func (s *store) finish(queue []*pendingChange, err error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	for _, p := range queue {
		if err != nil {
			p.done <- errNotSaved
		} else {
			p.done <- s.apply(p.change)
		}
	}
}

// apply makes a change in memory, at startup and afterwards. It decides races: a
// change that loses is in FILE, too, but has no effect, now or at startup.
func (m *memory) apply(c change) error {
	switch {
	case c.User != nil:
		return m.addUser(*c.User, c.Session)
	case c.Session != nil:
		return m.addSession(c.Session)
	case c.Logout != nil:
		return m.logOut(*c.Logout)
	case c.Create != nil:
		return m.addIdea(c.Create)
	case c.Update != nil:
		return m.replaceIdea(c.Update)
	case c.Delete != nil:
		return m.removeIdea(*c.Delete)
	case c.Probe != "":
		return nil
	}
	return errInconsistent
}

// size returns the number of changes in a snapshot, not counting logouts, which
// are temporary.
func (m *memory) size() int { return len(m.accounts) + len(m.sessions) + len(m.ideas) }

// logHealth logs the first failure, and the recovery. The caller holds no lock,
// as the log may block.
func (s *store) logHealth(failedBefore bool, err error) {
	switch {
	case err != nil && !failedBefore:
		s.logger.Error("cannot save changes; check the disk that holds the data file", "error", err)
	case err == nil && failedBefore:
		s.logger.Warn("changes can be saved again")
	}
}

// compactInBackground starts a compaction, at most once a second, or once a minute
// if the last one failed and FILE works without it. The caller holds fileMu.
func (s *store) compactInBackground() {
	wait := time.Second
	if s.compactFailed && !s.journal.broken {
		wait = time.Minute
	}
	if time.Since(s.lastCompaction) < wait || !s.compacting.TryLock() {
		return
	}
	s.lastCompaction = time.Now()
	go func() {
		err := s.compact(true)
		s.compacting.Unlock()
		if err != nil {
			s.logger.Error("cannot compact the data file; will try again", "error", err)
		}
	}()
}

// compact moves to a new file that begins with a snapshot of memory. Changes go on
// meanwhile: they are collected and follow the snapshot. A crash at any step leaves
// the old FILE or the new one, and both are complete. The caller holds compacting.
func (s *store) compact(inBackground bool) error {
	s.fileMu.Lock()
	old := s.journal
	all, lastID := s.snapshot()
	count := s.size()
	s.collecting = true
	s.fileMu.Unlock()

	next, err := createJournal(s.path+".tmp", s.disk, all, lastID, inBackground)
	if err == nil {
		s.fileMu.Lock()
		changes := s.collected
		s.collected = nil
		s.fileMu.Unlock()
		next.count = count
		err = next.append(changes) // so that few remain to be written under the lock
	}

	s.fileMu.Lock()
	if err == nil {
		err = s.moveTo(next)
	}
	s.collecting, s.collected = false, nil
	s.compactFailed = err != nil
	if s.journal.broken {
		s.failing.Store(true) // so GET /healthz says it, and makes it try again
	}
	s.fileMu.Unlock()

	if err != nil {
		next.close()
		os.Remove(s.path + ".tmp")
		return err
	}
	old.close() // outside the lock: freeing the blocks of a large file takes time
	return nil
}

// moveTo puts a new file in the place of FILE. The caller holds fileMu.
func (s *store) moveTo(next *journal) error {
	if err := next.append(s.collected); err != nil {
		return err
	}
	next.file.Close() // Windows cannot rename an open file
	if runtime.GOOS == "windows" {
		s.journal.close() // nor replace one
	}
	wasBroken := s.journal.broken
	s.journal.broken = true // it must get no more changes
	err := s.disk.do("rename", s.path, func() error { return os.Rename(s.path+".tmp", s.path) })
	if err != nil {
		// A rename can return an error although it happened.
		s.journal.broken = wasBroken || !s.journal.isAt(s.path)
		return err
	}
	if err := s.disk.syncDirectory(filepath.Dir(s.path)); err != nil {
		return err
	}
	if next.file, err = os.OpenFile(s.path, os.O_RDWR, 0); err != nil {
		return err
	}
	next.path = s.path
	s.journal = next
	return nil
}

// A snapshot calls use with the shortest list of changes that makes a memory,
// always in the same order, so that two files can be compared line by line.
type snapshot func(use func(change))

// snapshot copies pointers, so that fileMu is not held for long. It keeps
// logged-out tokens for a day after they expire, in case the clock is set back.
func (s *store) snapshot() (all snapshot, lastID string) {
	s.mu.Lock()
	lastID = strconv.FormatUint(s.lastID, 36)
	aDayAgo := time.Now().Add(-24 * time.Hour).Unix()
	maps.DeleteFunc(s.loggedOut, func(t tokenID, _ struct{}) bool { return t.Expires < aDayAgo })
	s.mu.Unlock()

	accounts := make([]account, 0, len(s.accounts))
	for _, a := range s.accounts {
		accounts = append(accounts, account{a.user, slices.Clone(a.sessions), slices.Clone(a.ideas)})
	}
	tokens := slices.Collect(maps.Keys(s.loggedOut))
	return func(use func(change)) {
		slices.SortFunc(accounts, func(a, b account) int { return cmp.Compare(a.user.ID, b.user.ID) })
		slices.SortFunc(tokens, compareTokens)
		for _, a := range accounts {
			use(change{User: &a.user})
			for _, session := range a.sessions {
				use(change{Session: session})
			}
			for _, i := range a.ideas {
				use(change{Create: i})
			}
		}
		for _, token := range tokens {
			use(change{Logout: &logout{tokenID: token}})
		}
	}, lastID
}

// openStore reads FILE, and writes only the lock. With no path or no FILE, the
// store is empty.
func openStore(path string, disk disk, logger *slog.Logger) (*store, error) {
	s := &store{memory: newMemory(), disk: disk, logger: logger}
	if path == "" {
		return s, nil
	}
	var err error
	if s.path, err = realPath(path); err != nil {
		return nil, err
	}
	if s.lock, err = lock(s.path + ".lock"); err != nil {
		return nil, err
	}
	if err := s.load(); err != nil {
		s.lock.Close()
		return nil, err
	}
	return s, nil
}

// lockError distinguishes a file that another process has locked from a file system
// that cannot lock files.
func lockError(err error) error {
	if errors.Is(err, syscall.EWOULDBLOCK) {
		return errLocked
	}
	return fmt.Errorf("the file system cannot lock files (%w); put this file on another one", err)
}

// load reads FILE into memory.
func (s *store) load() error {
	s.journal = &journal{path: s.path, disk: s.disk}
	file, err := os.OpenFile(s.path, os.O_RDWR, 0)
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	} else if err != nil {
		return err
	}
	s.journal.file, s.loading = file, true
	if info, err := file.Stat(); err == nil {
		s.ideas = make(map[string]*storedIdea, info.Size()/200) // growing it takes 4% of a start
	}
	// Nearly everything allocated now stays, so collecting less often makes loading
	// an eighth faster.
	defer debug.SetGCPercent(debug.SetGCPercent(400))
	err = s.replay()
	if errors.Is(err, errNoChecksum) {
		err = s.loadEdited()
	}
	if err != nil {
		file.Close()
		return err
	}
	s.sortLists()
	s.torn, s.journal.count = s.journal.torn, s.size()
	return nil
}

// replay applies all changes in FILE. They are decoded in batches, on all cores.
func (s *store) replay() error {
	batches := make(chan *batch, runtime.GOMAXPROCS(0))
	applied := make(chan error, 1)
	go func() { applied <- s.applyBatches(batches) }()

	b := newBatch()
	send := func() {
		go b.decode()
		batches <- b
		b = newBatch()
	}
	lastID, err := s.journal.read(func(changes []byte, line int) {
		if len(changes) == 0 || len(b.text) > batchSize { // no batch skips a line
			send()
		}
		if len(changes) > 0 {
			b.add(changes, line)
		}
	})
	send()
	close(batches)
	applyErr := <-applied
	s.usedID(lastID)
	return cmp.Or(err, applyErr) // an error in reading explains the other
}

const batchSize = 64 << 10 // bytes

// A batch is a part of FILE that is decoded as a unit.
type batch struct {
	text    []byte // changes in JSON, one or more a line
	line    int    // of the first change
	changes []change
	err     error
	decoded chan struct{} // closed when changes and err are set
}

func newBatch() *batch {
	const lastLine = 1 << 10 // most lines are shorter
	return &batch{text: append(make([]byte, 0, batchSize+lastLine), '['), decoded: make(chan struct{})}
}

// add adds the changes of the next line.
func (b *batch) add(changes []byte, line int) {
	if b.line == 0 {
		b.line = line
	} else {
		b.text = append(b.text, "\n,"...)
	}
	b.text = append(b.text, changes...)
}

func (b *batch) decode() {
	defer close(b.decoded)
	b.text = append(b.text, ']')
	dec := json.NewDecoder(bytes.NewReader(b.text))
	dec.DisallowUnknownFields()
	dec.Token() // [
	for line, from := b.line, int64(0); dec.More(); {
		line += bytes.Count(b.text[from:dec.InputOffset()], []byte("\n"))
		from = dec.InputOffset()
		c := change{line: line}
		if err := dec.Decode(&c); err != nil {
			b.err = fmt.Errorf("line %d: %w", line, decodeError(err))
			return
		}
		c.keepJSON(b.text[from:dec.InputOffset()])
		b.changes = append(b.changes, c)
	}
}

func decodeError(err error) error {
	if _, field, ok := strings.Cut(err.Error(), "unknown field "); ok { // there is no type for it
		return fmt.Errorf("unknown field %s; use the newer version of ideapool that wrote it, or correct it", field)
	}
	return fmt.Errorf("damaged: %w; restore a backup, or correct it if you edited it", err)
}

func (s *store) applyBatches(batches <-chan *batch) (err error) {
	for b := range batches {
		<-b.decoded
		for _, c := range b.changes {
			err = cmp.Or(err, s.replayChange(c))
		}
		err = cmp.Or(err, b.err)
	}
	return err
}

func (s *store) replayChange(c change) error {
	err := s.apply(c)
	if err == nil || isLostRace(err) {
		return nil
	}
	return fmt.Errorf("line %d: %w; restore a backup", c.line, err)
}

// isLostRace reports whether apply returns err for the loser of two concurrent
// changes. Any other error can only come from a damaged file.
func isLostRace(err error) bool { return errors.Is(err, errEmailTaken) || errors.Is(err, errNoIdea) }

// loadEdited reads a FILE that somebody edited by hand: one document in any
// layout, without a checksum. It validates ids, e-mails and ideas, and makes the
// JSON of ideas again.
func (s *store) loadEdited() error {
	data, err := os.ReadFile(s.path)
	if err != nil {
		return err
	}
	var doc struct {
		Format  int      `json:"format"`
		LastID  string   `json:"last_id"`
		Changes []change `json:"changes"`
		CRC32C  string   `json:"crc32c"`
	}
	dec := json.NewDecoder(bytes.NewReader(data))
	dec.DisallowUnknownFields()
	err = dec.Decode(&doc)
	_, end := dec.Token()
	switch { // the format first: another version may have other fields
	case len(bytes.TrimSpace(data)) == 0:
		return errors.New("empty; restore a backup, or remove it to start over")
	case doc.Format == 1:
		return errors.New("format 1, from an older version of ideapool, which this one cannot read; choose another path")
	case doc.Format > 2:
		return fmt.Errorf("format %d, from a newer version of ideapool; use that version", doc.Format)
	case err != nil:
		return decodeError(err)
	case doc.Format != 2:
		return errors.New("not a data file of ideapool; choose another path")
	case doc.CRC32C != "":
		return errDamaged
	case end != io.EOF:
		return errors.New("something follows the first document; restore a backup (and stop the server before you edit the file)")
	case doc.LastID != "" && doc.LastID != "0" && !idShape.MatchString(doc.LastID):
		return fmt.Errorf("the last_id %q is invalid; correct it, or remove it", doc.LastID)
	}
	s.memory = newMemory()
	s.loading = true
	s.usedID(doc.LastID)
	for n, c := range doc.Changes {
		if err := s.apply(c); err != nil {
			return fmt.Errorf("changes[%d]: %w; correct it, or restore a backup", n, err)
		}
	}
	if id := strconv.FormatUint(s.lastID, 36); id[0] == 'y' {
		return fmt.Errorf("the id %s leaves no room for new ones; correct it", id)
	}
	return nil
}

// start makes the store ready for changes.
func (s *store) start() error {
	if s.journal == nil {
		return nil
	}
	if s.journal.size > 1<<20 {
		defer func() { go debug.FreeOSMemory() }() // loading leaves garbage
	}
	s.compacting.Lock()
	defer s.compacting.Unlock()
	if s.journal.clean {
		// There may have been a crash between the last rename and this.
		return s.disk.syncDirectory(filepath.Dir(s.path))
	}
	isNew := s.journal.file == nil
	err := s.compact(false)
	if err != nil && isNew {
		os.Remove(s.path)
	}
	return err
}

// close compacts FILE, so that it holds only a snapshot. Later changes are
// rejected.
func (s *store) close() error {
	if s.path == "" {
		return nil
	}
	s.compacting.Lock() // and never unlocked
	s.fileMu.Lock()
	s.closed = true
	done := s.journal.clean && !s.journal.broken
	s.fileMu.Unlock()
	if done {
		return nil
	}
	return s.compact(false)
}

// release lets another process use FILE.
func (s *store) release() {
	if s.journal != nil {
		s.journal.close()
		s.lock.Close()
	}
}

// A journal is FILE: JSON values that are on disk once append has returned. It
// begins with a snapshot, one change per line. Then there is a line for each
// commit:
//
//	{"format":2,"last_id":"6d3r16h4n","changes":[
//	{"user":{…}},
//	{"create":{…}}
//	],"crc32c":"5c1f3a77"}
//	{"changes":[{"update":{…}}],"crc32c":"99e3f1a2"}
//
// A checksum covers all text before it, except other checksums, so it reveals
// damaged, missing and moved lines, but not lines that are missing at the end.
type journal struct {
	path   string
	disk   disk
	file   *os.File
	size   int64  // of what is acknowledged, in bytes
	sum    uint32 // of what is acknowledged
	count  int    // of the changes; see memory.size
	clean  bool   // the file holds only a snapshot
	torn   int    // the number of an incomplete last line; see read
	broken bool   // nobody knows what the file holds: it gets no more changes
}

var (
	errDamaged    = errors.New("damaged: a checksum does not match; restore a backup (or remove crc32c, if you edited the file)")
	errNoChecksum = errors.New("no checksum")
)

const (
	headerFormat   = `{"format":2,"last_id":%q,"changes":[`
	checksumFormat = `,"crc32c":"%08x"}`
	checksumLength = len(`,"crc32c":"5c1f3a77"}`)
)

func castagnoli() *crc32.Table { return crc32.MakeTable(crc32.Castagnoli) }

// createJournal writes a new file that begins with a snapshot. In the background
// it pauses, so that others can use the disk.
func createJournal(path string, disk disk, all snapshot, lastID string, inBackground bool) (*journal, error) {
	file, err := disk.create(path)
	if err != nil {
		return nil, err
	}
	j := &journal{path: path, disk: disk, file: file, clean: true}
	err = disk.do("write", path, func() error { return j.writeSnapshot(all, lastID, inBackground) })
	if err == nil {
		err = disk.do("sync", path, file.Sync)
	}
	if err != nil {
		j.close()
		return nil, err
	}
	return j, nil
}

func (j *journal) writeSnapshot(all snapshot, lastID string, inBackground bool) (err error) {
	sum := crc32.New(castagnoli())
	w := bufio.NewWriterSize(io.MultiWriter(j.file, sum), 1<<16)
	fmt.Fprintf(w, headerFormat, lastID)
	separator, line, count := "\n", []byte(nil), 0
	all(func(c change) {
		if err != nil {
			return // the rest would be in vain
		}
		line = c.appendJSON(line[:0])
		w.WriteString(separator)
		w.Write(line)
		separator = ",\n"
		if count++; inBackground && count%1024 == 0 {
			// An fsync of FILE could wait for all of this (ext4). So this is written in
			// parts, and FILE has the disk to itself for half of the time.
			begin := time.Now()
			err = cmp.Or(w.Flush(), j.disk.do("sync", j.path, j.file.Sync))
			time.Sleep(time.Since(begin))
		}
	})
	w.WriteString("\n]")
	if err = cmp.Or(err, w.Flush()); err != nil { // Flush also returns earlier errors
		return err
	}
	j.sum = sum.Sum32()
	if _, err = fmt.Fprintf(j.file, checksumFormat+"\n", j.sum); err == nil {
		j.size, err = j.file.Seek(0, io.SeekCurrent)
	}
	return err
}

// append returns nil once the changes are on disk.
func (j *journal) append(changes [][]byte) error {
	if len(changes) == 0 {
		return nil
	}
	line := slices.Concat([]byte(`{"changes":[`), bytes.Join(changes, []byte(",")), []byte("]"))
	sum := crc32.Update(j.sum, castagnoli(), line)
	line = fmt.Appendf(line, checksumFormat+"\n", sum)
	if err := j.write(line); err != nil {
		return err
	}
	j.size, j.sum, j.count, j.clean = j.size+int64(len(line)), sum, j.count+len(changes), false
	return nil
}

// write puts a line after what is acknowledged, or cuts the file back to that.
// After a failed fsync the kernel may treat lost pages as written
// (PostgreSQL's "fsyncgate"), so the file is broken then.
func (j *journal) write(line []byte) error {
	err := j.disk.do("write", j.path, func() error {
		_, err := j.file.WriteAt(line, j.size)
		return err
	})
	if err == nil {
		if err = j.disk.do("sync", j.path, j.file.Sync); err == nil {
			return nil
		}
		j.broken = true
	}
	cutErr := j.disk.do("truncate", j.path, func() error { return j.file.Truncate(j.size) })
	if cutErr == nil {
		cutErr = j.disk.do("sync", j.path, j.file.Sync)
	}
	if cutErr != nil {
		j.broken = true
	}
	return err
}

// isAt reports whether path names the file.
func (j *journal) isAt(path string) bool {
	mine, err1 := j.file.Stat()
	there, err2 := os.Stat(path)
	return err1 == nil && err2 == nil && os.SameFile(mine, there)
}

func (j *journal) close() {
	if j != nil {
		j.file.Close() // what counts was fsynced
	}
}

// read calls use with the changes of each line, in JSON and separated by commas. It
// drops an incomplete last line, which was never acknowledged. It returns the last
// id of the snapshot, or errNoChecksum for a file that was edited by hand.
func (j *journal) read(use func(changes []byte, line int)) (lastID string, err error) {
	info, err := j.file.Stat()
	if err != nil {
		return "", err
	}
	r := bufio.NewReaderSize(j.file, 1<<16)
	header, _ := readLine(r)
	fmt.Sscanf(string(header), headerFormat, &lastID)
	if string(header) != fmt.Sprintf(headerFormat+"\n", lastID) {
		return "", errNoChecksum
	}
	j.sum, j.size = crc32.Checksum(header, castagnoli()), int64(len(header))

	inSnapshot := true
	for number := 2; j.size < info.Size(); number++ {
		line, err := readLine(r)
		if err != nil {
			return "", err
		}
		isLast := j.size+int64(len(line)) == info.Size()
		if isLast && !inSnapshot && isTorn(line) {
			j.torn, j.clean = number, false
			return lastID, nil
		}
		text, ending := cutChecksum(line)
		j.sum = crc32.Update(j.sum, castagnoli(), text)
		j.size += int64(len(line))
		if inSnapshot && ending == "" {
			use(bytes.TrimRight(text, ",\n"), number)
			continue
		}
		if ending != fmt.Sprintf(checksumFormat, j.sum) {
			return "", fmt.Errorf("line %d: %w", number, errDamaged)
		}
		j.clean = inSnapshot && bytes.HasSuffix(line, []byte("\n"))
		inSnapshot = false
		text = bytes.TrimPrefix(text, []byte(`{"changes":[`))
		use(bytes.TrimSuffix(text, []byte("]")), number)
	}
	if inSnapshot {
		return "", errNoChecksum
	}
	return lastID, nil
}

// readLine returns the next line with its line end, which the last one may lack.
func readLine(r *bufio.Reader) ([]byte, error) {
	line, err := r.ReadBytes('\n')
	if err == io.EOF && len(line) > 0 {
		err = nil
	}
	return line, err
}

// isTorn reports whether the last line did not reach the disk as a whole: it has no
// line end, or zeros in place of a block that was lost.
func isTorn(line []byte) bool {
	return !bytes.HasSuffix(line, []byte("\n")) || line[0] == 0 || bytes.Contains(line, []byte{0, 0})
}

// cutChecksum splits a line before its checksum, if it has one.
func cutChecksum(line []byte) (text []byte, ending string) {
	whole := bytes.TrimSuffix(line, []byte("\n"))
	at := len(whole) - checksumLength
	if at < 0 || !bytes.HasPrefix(whole[at:], []byte(`,"crc32c":`)) {
		return line, ""
	}
	return whole[:at], string(whole[at:])
}

// A disk runs each file operation that durability depends on. It is nil except in
// tests, which make operations fail.
type disk func(op, path string, do func() error) error

func (d disk) do(op, path string, do func() error) error {
	if d == nil {
		return do()
	}
	return d(op, path, do)
}

// create makes a new file that only its owner can read. It never writes through a
// link that somebody left in its place.
func (d disk) create(path string) (f *os.File, err error) {
	err = d.do("create", path, func() error {
		if err := os.Remove(path); err != nil && !errors.Is(err, fs.ErrNotExist) {
			return fmt.Errorf("%w; remove it by hand", err)
		}
		f, err = os.OpenFile(path, os.O_RDWR|os.O_CREATE|os.O_EXCL, 0o600)
		return err
	})
	return f, err
}

// syncDirectory makes the entries of a directory durable. Some file systems, such
// as CIFS, cannot, and Windows need not.
func (d disk) syncDirectory(path string) error {
	err := d.do("sync", path, func() error {
		if runtime.GOOS == "windows" {
			return nil
		}
		directory, err := os.Open(path)
		if err != nil {
			return err
		}
		defer directory.Close()
		return directory.Sync()
	})
	if errors.Is(err, syscall.EINVAL) || errors.Is(err, errors.ErrUnsupported) {
		return nil
	}
	return err
}
