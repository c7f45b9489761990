package main

import (
	"bufio"
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"hash/crc32"
	"io"
	"io/fs"
	"log/slog"
	"maps"
	"net/http"
	"os"
	"path/filepath"
	"regexp"
	"runtime"
	"slices"
	"strconv"
	"sync"
	"sync/atomic"
	"syscall"
	"time"
)

// A store keeps everything in memory, where requests read it, and in one file,
// FILE. FILE begins with a snapshot of memory, one change per line, and goes on
// with one line for each batch of changes that came later:
//
//	{"format":2,"last_id":"6d3r16h4n","changes":[
//	{"user":{…}},
//	{"create":{…}}
//	],"crc32c":"5c1f3a77"}
//	{"changes":[{"update":{…}},{"delete":{…}}],"crc32c":"99e3f1a2"}
//
// A change is first appended to FILE, then fsynced, then applied to memory, and
// then acknowledged. So nobody sees a change that a crash could still lose, and
// memory never has to be undone. A start applies the same changes in the same
// order, and so ends with the same memory.
//
// One goroutine, the writer, does all of this. It alone writes FILE, and it alone
// changes memory (except ids), for which it locks mu. So it reads memory without the
// lock. Before it starts, and after it has ended, start and close take its place.
type store struct {
	mu sync.RWMutex // held by handlers to read memory, and by the writer to change it
	memory

	file     *dataFile // nil if everything is kept in memory only
	queue    chan pendingChange
	stopping chan struct{}  // closed by close
	running  sync.WaitGroup // the writer
	failing  atomic.Bool    // changes cannot be saved right now
	failedAt time.Time      // when the writer last failed to write FILE anew
	lock     *os.File
	logger   *slog.Logger
}

// A record is one JSON value of FILE: the snapshot, or a batch. The checksums reveal
// lines that were damaged, removed or moved, except at the end.
type record struct {
	Format  int      `json:"format,omitempty"`  // of the snapshot
	LastID  string   `json:"last_id,omitempty"` // in the snapshot; see idSource
	Changes []change `json:"changes"`
	CRC32C  string   `json:"crc32c,omitempty"` // of all text before it, except other checksums
}

// A change is one thing that happened, stored with its results, such as ids,
// times and hashes. One member is set, and for a sign-up two.
type change struct {
	User    *user       `json:"user,omitempty"`    // signed up
	Session *session    `json:"session,omitempty"` // logged in
	Logout  *logout     `json:"logout,omitempty"`
	Create  *storedIdea `json:"create,omitempty"`
	Update  *storedIdea `json:"update,omitempty"`
	Delete  *ideaKey    `json:"delete,omitempty"`
	Probe   string      `json:"probe,omitempty"` // nothing happened; see checkHealth
}

// validate checks a change from a handler or from FILE, and makes the JSON of an idea.
// Each case wants that no members are set but these.
func (c change) validate() error {
	switch c {
	case change{}:
		return errInconsistent
	case change{User: c.User, Session: c.Session}:
		if c.User == nil {
			return nil
		}
		return c.User.validate()
	case change{Create: c.Create}:
		return c.Create.encode()
	case change{Update: c.Update}:
		return c.Update.encode()
	case change{Logout: c.Logout}, change{Delete: c.Delete}, change{Probe: c.Probe}:
		return nil
	}
	return errInconsistent
}

// memory holds all data, indexed the way it is looked up.
type memory struct {
	accounts  map[string]*account    // by user id
	emails    map[string]*account    // by e-mail in lower case
	sessions  map[string]*session    // by key
	ideas     map[string]*storedIdea // by id
	loggedOut map[tokenID]struct{}   // access tokens
	ids       idSource
}

// An account is a user and what belongs to them.
type account struct {
	user     user
	sessions []*session    // oldest first
	ideas    []*storedIdea // in the order of compareIdeas
}

var (
	errNotSaved     = &apiError{status: http.StatusServiceUnavailable, retryAfter: 1, Reason: "cannot save changes right now; please try again"}
	errInconsistent = errors.New("it is invalid, or contradicts earlier changes")
)

// apply makes a change. After an error, nothing has changed. It decides races
// (errEmailTaken, errNoIdea): the loser is in FILE, too, but has no effect.
func (m *memory) apply(c change) error {
	switch {
	case c.User != nil:
		return m.addUser(*c.User, c.Session)
	case c.Session != nil:
		return m.addSession(c.Session)
	case c.Logout != nil:
		return m.endToken(*c.Logout)
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

// size returns the number of changes in a snapshot.
func (m *memory) size() int {
	return len(m.accounts) + len(m.sessions) + len(m.ideas) + len(m.loggedOut)
}

// snapshot returns the changes that make this memory, always in the same order. It
// leaves out sessions and logouts that expired before a time.
func (m *memory) snapshot(before int64) []change {
	var changes []change
	for _, id := range slices.Sorted(maps.Keys(m.accounts)) {
		a := m.accounts[id]
		changes = append(changes, change{User: &a.user})
		for _, theirs := range a.sessions {
			if theirs.Expires >= before {
				changes = append(changes, change{Session: theirs})
			}
		}
		for _, i := range a.ideas {
			changes = append(changes, change{Create: i})
		}
	}
	for _, token := range slices.SortedFunc(maps.Keys(m.loggedOut), compareTokens) {
		if token.Expires >= before {
			changes = append(changes, change{Logout: &logout{tokenID: token}})
		}
	}
	return changes
}

// forget removes what snapshot leaves out.
func (m *memory) forget(before int64) {
	for _, theirs := range m.sessions {
		if theirs.Expires < before {
			m.endSession(theirs)
		}
	}
	maps.DeleteFunc(m.loggedOut, func(t tokenID, _ struct{}) bool { return t.Expires < before })
}

// An idSource makes ids that rise with time and never repeat: units of 100 µs since
// 1970, in base 36. Until 2282 they have the shape of idShape.
type idSource struct {
	mu   sync.Mutex
	last uint64
}

var idShape = regexp.MustCompile(`^[1-9a-y][0-9a-z]{8}$`)

func (s *idSource) next() string {
	const first = 36 * 36 * 36 * 36 * 36 * 36 * 36 * 36
	s.mu.Lock()
	defer s.mu.Unlock()
	s.last = max(s.last+1, uint64(time.Now().UnixMicro()/100), first)
	return strconv.FormatUint(s.last, 36)
}

// skip makes sure that next returns higher ids from now on.
func (s *idSource) skip(id string) {
	n, _ := strconv.ParseUint(id, 36, 64)
	s.mu.Lock()
	defer s.mu.Unlock()
	s.last = max(s.last, n)
}

// String returns the highest id so far, or "0".
func (s *idSource) String() string {
	s.mu.Lock()
	defer s.mu.Unlock()
	return strconv.FormatUint(s.last, 36)
}

// openStore locks FILE and reads it. With no path or no FILE, the store is empty.
func openStore(path string, d disk, logger *slog.Logger) (*store, error) {
	s := &store{
		memory: memory{
			accounts:  make(map[string]*account),
			emails:    make(map[string]*account),
			sessions:  make(map[string]*session),
			ideas:     make(map[string]*storedIdea),
			loggedOut: make(map[tokenID]struct{}),
		},
		queue:    make(chan pendingChange),
		stopping: make(chan struct{}),
		logger:   logger,
	}
	if path == "" {
		return s, nil
	}
	path, err := realPath(path)
	if err != nil {
		return nil, err
	}
	if s.lock, err = lock(path + ".lock"); err != nil {
		return nil, err
	}
	s.file = &dataFile{path: path, disk: d}
	if err := s.file.load(&s.memory); err != nil {
		s.release()
		return nil, err
	}
	return s, nil
}

// start prepares FILE and starts the writer. If a FILE that exists cannot be written,
// reads work all the same, and each change tries again.
func (s *store) start() error {
	if s.file != nil {
		err := s.prepareFile()
		if s.file.file == nil { // there was no FILE, and none could be made
			return err
		}
		s.reportHealth(err)
	}
	s.running.Go(s.write)
	return nil
}

// prepareFile fsyncs FILE, which a server that was killed may not have, or mends it.
func (s *store) prepareFile() error {
	f := s.file
	os.Remove(f.path + ".tmp") // of a compaction that did not end
	if f.isIntact() && f.fsync() == nil && f.disk.syncDirectory(filepath.Dir(f.path)) == nil {
		return nil
	}
	f.info = nil
	return s.compact()
}

// close ends the writer and leaves FILE as one document, a snapshot. Later changes
// are rejected.
func (s *store) close() error {
	close(s.stopping)
	s.running.Wait()
	if s.file == nil || s.file.later == 0 && s.file.isIntact() {
		return nil
	}
	return s.compact()
}

// release lets another process use FILE.
func (s *store) release() {
	if s.file != nil {
		s.file.file.Close() // what counts was fsynced
		s.lock.Close()
	}
}

// checkHealth returns errNotSaved if changes cannot be saved. After a failure it
// tries again, with a change that has no effect.
func (s *store) checkHealth() error {
	if !s.failing.Load() {
		return nil
	}
	return s.commit(change{Probe: "-"})
}

// A pendingChange waits for the writer.
type pendingChange struct {
	change
	result chan error
}

// commit saves a change, applies it, and returns the result: errNotSaved if it cannot
// be saved, errEmailTaken or errNoIdea if another change came first. A change that
// apply would reject for another reason must not reach FILE: the next start would fail.
func (s *store) commit(c change) error {
	if err := c.validate(); err != nil {
		return err
	}
	p := pendingChange{c, make(chan error, 1)}
	select {
	case s.queue <- p: // without a buffer, the writer has it now, and will answer
		return <-p.result
	case <-s.stopping:
		return errNotSaved
	}
}

// write is the writer. A panic in it ends the process, as half-changed memory must
// not be used. (In a handler, net/http would recover the panic and go on.)
func (s *store) write() {
	for {
		select {
		case first := <-s.queue:
			s.commitBatch(s.collect(first))
		case <-s.stopping:
			return
		}
	}
}

// collect returns a batch of all changes that are waiting: one fsync is enough for
// them. Gosched lets goroutines run that may be about to send one. With one core, they
// would not get to it, and creates would take three times as long.
func (s *store) collect(first pendingChange) []pendingChange {
	batch := []pendingChange{first}
	for {
		runtime.Gosched()
		select {
		case p := <-s.queue:
			batch = append(batch, p)
		default:
			return batch
		}
	}
}

func (s *store) commitBatch(batch []pendingChange) {
	err := s.save(batch)
	s.reportHealth(err) // before anybody hears of the result
	for _, p := range batch {
		result := error(errNotSaved)
		if err == nil {
			s.mu.Lock()
			result = s.apply(p.change)
			s.mu.Unlock()
		}
		p.result <- result
	}
	// Compact when FILE has more later changes than a snapshot would have, and 1,000.
	if s.file != nil && s.file.later-s.file.tried > 1000+s.size() {
		if err := s.compact(); err != nil {
			s.file.tried = s.file.later // try again after as many changes
			if !s.file.isIntact() {
				s.failing.Store(true) // so GET /healthz says it, and tries again
			}
			go s.logger.Error("cannot compact the data file; will try again later", "error", err)
		}
	}
}

// save returns nil once the changes are on disk.
func (s *store) save(batch []pendingChange) error {
	if s.file == nil {
		return nil
	}
	if !s.file.isIntact() {
		if err := s.rewriteFile(); err != nil {
			return err
		}
	}
	changes := make([]change, len(batch))
	for n, p := range batch {
		changes[n] = p.change
	}
	return s.file.append(changes)
}

// rewriteFile writes FILE anew from memory, at most once a second while that fails.
func (s *store) rewriteFile() error {
	if time.Since(s.failedAt) < time.Second {
		return errNotSaved
	}
	if !s.failing.Load() {
		go s.logger.Warn("the data file is not as the server left it; writing it anew", "file", s.file.path)
	}
	err := s.compact()
	if err != nil {
		s.failedAt = time.Now()
	}
	return err
}

// reportHealth logs the first failure, and the recovery. The log may be a full pipe,
// so the writer does not wait for it.
func (s *store) reportHealth(err error) {
	failedBefore := s.failing.Swap(err != nil)
	switch {
	case err != nil && !failedBefore:
		go s.logger.Error("cannot save changes; check the disk that holds the data file", "error", err)
	case err == nil && failedBefore:
		go s.logger.Warn("changes can be saved again")
	}
}

// compact replaces FILE by a snapshot of memory. Changes wait meanwhile, reads do
// not. Sessions and logouts are kept for a day after they expire, in case the clock
// is set back.
func (s *store) compact() error {
	aDayAgo := time.Now().Add(-24 * time.Hour).Unix()
	if err := s.file.replace(s.ids.String(), s.snapshot(aDayAgo)); err != nil {
		return err
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	s.forget(aDayAgo) // not earlier: memory and the old FILE would differ
	return nil
}

// A dataFile is FILE, or FILE.tmp while that is written.
type dataFile struct {
	path  string
	disk  disk
	file  *os.File    // nil if there is no FILE yet
	info  os.FileInfo // of file; nil means that FILE must be written anew
	size  int64       // of what is acknowledged, in bytes
	sum   uint32      // its checksum
	later int         // changes after the snapshot
	tried int         // how many there were when a compaction failed
	torn  int         // the number of an incomplete last line that load dropped
}

const (
	checksumFormat = `,"crc32c":"%08x"}`
	checksumLength = len(`,"crc32c":"5c1f3a77"}`)
)

var castagnoli = crc32.MakeTable(crc32.Castagnoli)

// isIntact reports whether path names the file, with the size that it should have: no
// write has failed, and nobody has changed or removed FILE. (SameFile(x, nil) is false.)
func (f *dataFile) isIntact() bool {
	info, err := os.Stat(f.path)
	return err == nil && os.SameFile(info, f.info) && info.Size() == f.size
}

// append returns nil once the changes are on disk, in a new line.
func (f *dataFile) append(changes []change) error {
	text, err := json.Marshal(record{Changes: changes})
	if err != nil {
		return err
	}
	text = bytes.TrimSuffix(text, []byte("}"))
	sum := crc32.Update(f.sum, castagnoli, text)
	line := fmt.Appendf(text, checksumFormat+"\n", sum)
	if err := f.writeLine(line); err != nil {
		return err
	}
	f.size, f.sum, f.later = f.size+int64(len(line)), sum, f.later+len(changes)
	return nil
}

// writeLine writes and fsyncs a line, or takes it back: a change that was rejected
// must not come true at the next start.
func (f *dataFile) writeLine(line []byte) error {
	err := f.disk("write", f.path, func() error {
		_, err := f.file.WriteAt(line, f.size)
		return err
	})
	if err == nil {
		err = f.fsync()
	}
	if err == nil {
		return nil
	}
	if f.disk("truncate", f.path, func() error { return f.file.Truncate(f.size) }) != nil {
		f.info = nil
	}
	f.fsync()
	return err
}

// fsync makes what was written durable. After a failure, the kernel may treat lost
// pages as written (PostgreSQL's "fsyncgate"), so the file is never trusted again.
func (f *dataFile) fsync() error {
	err := f.disk("sync", f.path, f.file.Sync)
	if err != nil {
		f.info = nil
	}
	return err
}

// replace puts a new file with a snapshot in the place of FILE. A crash at any step
// leaves the old FILE or the new one, and both are complete.
func (f *dataFile) replace(lastID string, changes []change) error {
	next := dataFile{path: f.path + ".tmp", disk: f.disk}
	err := next.create(lastID, changes)
	if err == nil {
		err = f.move(next.path)
	}
	if err != nil {
		os.Remove(next.path)
		return err
	}
	f.size, f.sum, f.later, f.tried = next.size, next.sum, 0, 0
	return nil
}

// create makes a new file that only its owner can read. It never writes through a
// link that somebody left in its place.
func (f *dataFile) create(lastID string, changes []change) error {
	err := f.disk("create", f.path, func() (err error) {
		os.Remove(f.path)
		f.file, err = os.OpenFile(f.path, os.O_WRONLY|os.O_CREATE|os.O_EXCL, 0o600)
		return err
	})
	if err != nil {
		return err
	}
	defer f.file.Close()
	err = f.disk("write", f.path, func() error { return f.writeSnapshot(lastID, changes) })
	if err != nil {
		return err
	}
	return f.fsync()
}

func (f *dataFile) writeSnapshot(lastID string, changes []change) (err error) {
	hash := crc32.New(castagnoli)
	w := bufio.NewWriterSize(io.MultiWriter(f.file, hash), 1<<16)
	fmt.Fprintf(w, `{"format":2,"last_id":%q,"changes":[`, lastID)
	for n, c := range changes {
		if n > 0 {
			w.WriteString(",")
		}
		if i := c.Create; i != nil { // its JSON exists already
			fmt.Fprintf(w, "\n{\"create\":{\"owner\":%q,\"idea\":%s}}", i.Owner, i.json)
			continue
		}
		text, err := json.Marshal(c)
		if err != nil {
			return err
		}
		fmt.Fprintf(w, "\n%s", text)
	}
	w.WriteString("\n]")
	if err := w.Flush(); err != nil { // Flush also returns the errors of earlier writes
		return err
	}
	f.sum = hash.Sum32()
	if _, err = fmt.Fprintf(f.file, checksumFormat+"\n", f.sum); err != nil {
		return err
	}
	f.size, err = f.file.Seek(0, io.SeekCurrent)
	return err
}

// move renames a new file to FILE, which is not intact until all of this is done.
func (f *dataFile) move(temporary string) error {
	f.info = nil
	f.file.Close() // Windows does not replace an open file
	err := f.disk("rename", f.path, func() error { return os.Rename(temporary, f.path) })
	if err == nil {
		err = f.disk.syncDirectory(filepath.Dir(f.path))
	}
	if err == nil {
		err = f.open()
	}
	return err
}

func (f *dataFile) open() (err error) {
	if f.file, err = os.OpenFile(f.path, os.O_RDWR, 0); err == nil {
		f.info, err = f.file.Stat()
	}
	return err
}

// load opens FILE, if there is one, and applies its changes to m.
func (f *dataFile) load(m *memory) error {
	err := f.open()
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	} else if err != nil {
		return err
	}
	data, err := os.ReadFile(f.path)
	if err != nil {
		return err
	}
	end, err := f.readSnapshot(data, m)
	if err == nil {
		err = f.readLines(data, end, m)
	}
	if err == nil {
		return nil
	}
	return fmt.Errorf(`%w; use the version that wrote it, restore a backup, or see "A data file that cannot be read" in README.md`, err)
}

// readSnapshot applies the first record of FILE and returns where it ends. A record
// that was edited by hand has no checksum, and any layout: it must be written anew.
func (f *dataFile) readSnapshot(data []byte, m *memory) (end int, err error) {
	r, end, err := decodeRecord(data)
	if e, ok := errors.AsType[*json.SyntaxError](err); ok {
		err = fmt.Errorf("line %d: %w", 1+bytes.Count(data[:e.Offset], []byte("\n")), err)
	}
	if e, ok := errors.AsType[*json.UnmarshalTypeError](err); ok {
		err = fmt.Errorf("line %d: %w", 1+bytes.Count(data[:e.Offset], []byte("\n")), err)
	}
	switch { // the format first: another version may have other fields
	case err == io.EOF:
		return 0, errors.New("it is empty")
	case r.Format != 0 && r.Format != 2:
		return 0, fmt.Errorf("format %d, from another version of ideapool", r.Format)
	case err != nil:
		return 0, err
	case r.Format == 0, r.Changes == nil:
		return 0, errors.New("it is not a data file of ideapool")
	case r.LastID != "" && r.LastID != "0" && !idShape.MatchString(r.LastID):
		return 0, fmt.Errorf("the last_id %q is no id", r.LastID)
	case r.CRC32C == "":
		f.info = nil
	case !f.verify(data[:end]):
		return 0, errChecksum
	}
	m.ids.skip(r.LastID)
	for n, c := range r.Changes {
		if err := m.replay(c); err != nil {
			return 0, fmt.Errorf("changes[%d]: %w", n, err)
		}
	}
	f.size = int64(end + len("\n"))
	return end, nil
}

var errChecksum = errors.New("damaged, or edited without removing crc32c: the checksum does not match")

// readLines applies the lines that follow the snapshot. A last line with a wrong
// checksum is dropped if it has no line end, or zeros in place of a lost block: it was
// never acknowledged. (One zero alone may be a flipped bit.) Other damage is an error.
// If only a line end is missing, or blank space follows, FILE is not intact.
func (f *dataFile) readLines(data []byte, end int, m *memory) error {
	text := bytes.TrimRight(data, " \t\r\n")
	hasEnd := bytes.Contains(data[len(text):], []byte("\n"))
	rest, isLine := bytes.CutPrefix(text[end:], []byte("\n"))
	if len(text) > end && (!isLine || f.info == nil) {
		return errors.New("something follows the snapshot (was it edited before the server had stopped?)")
	}
	if !hasEnd {
		f.info = nil
	}
	for number := 2 + bytes.Count(data[:end], []byte("\n")); len(rest) > 0; number++ {
		var line []byte
		line, rest, _ = bytes.Cut(rest, []byte("\n"))
		err := f.readLine(line, m)
		isTorn := !hasEnd || bytes.HasPrefix(line, []byte{0}) || bytes.Contains(line, []byte{0, 0})
		if err == errChecksum && len(rest) == 0 && isTorn {
			f.torn = number
			return nil
		}
		if err != nil {
			return fmt.Errorf("line %d: %w", number, err)
		}
	}
	return nil
}

func (f *dataFile) readLine(line []byte, m *memory) error {
	if !f.verify(line) {
		return errChecksum
	}
	r, _, err := decodeRecord(line)
	if err != nil {
		return err
	}
	for _, c := range r.Changes {
		err := m.replay(c)
		if err != nil && err != errEmailTaken && err != errNoIdea { // which lost a race
			return err
		}
	}
	f.size += int64(len(line) + len("\n"))
	f.later += len(r.Changes)
	return nil
}

// verify reports whether a record has the right checksum.
func (f *dataFile) verify(text []byte) bool {
	at := max(0, len(text)-checksumLength)
	sum := crc32.Update(f.sum, castagnoli, text[:at])
	if string(text[at:]) != fmt.Sprintf(checksumFormat, sum) {
		return false
	}
	f.sum = sum
	return true
}

// decodeRecord decodes the first JSON value of a text and returns where it ends.
func decodeRecord(text []byte) (r record, end int, err error) {
	dec := json.NewDecoder(bytes.NewReader(text))
	dec.DisallowUnknownFields()
	err = dec.Decode(&r)
	return r, int(dec.InputOffset()), err
}

// replay validates and applies a change that comes from FILE.
func (m *memory) replay(c change) error {
	if err := c.validate(); err != nil {
		return err
	}
	return m.apply(c)
}

// A disk runs each file operation that durability depends on. It is realDisk except
// in tests, which make operations fail.
type disk func(op, path string, do func() error) error

func realDisk(_, _ string, do func() error) error { return do() }

// syncDirectory makes the names in a directory durable. Some file systems, such as
// CIFS, cannot, and Windows need not.
func (d disk) syncDirectory(path string) error {
	err := d("sync", path, func() error {
		directory, err := os.Open(path)
		if err != nil {
			return err
		}
		defer directory.Close()
		return directory.Sync()
	})
	if runtime.GOOS == "windows" || errors.Is(err, syscall.EINVAL) || errors.Is(err, errors.ErrUnsupported) {
		return nil
	}
	return err
}
